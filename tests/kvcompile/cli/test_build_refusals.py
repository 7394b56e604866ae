"""`kvcompile build`: mistakes in names and options, refused before a model is profiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvcompile import calibration

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"
FROM = ("build", "--from", REFERENCE, "--mem", "25%")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*FROM, "--calib", "text.txt"), "--calib is about profiling the model"),
        ((*FROM, "--seed", "0"), "--seed is about profiling the model"),
        ((*FROM, "-o", "a" * 300), "name another file"),
        (("build", "--from", REFERENCE, "--mem", "1GB,2GB", "-o", "."), "is a folder"),
        (("build", "--from", REFERENCE, "--mem", "25%,1B", "-o", "x.kvb"), "a target of 1B"),
        ((*FROM, "-o", "/dev/null"), "no regular file"),
        (("build", "--model", "~nobody-of-that-name/x", "--mem", "25%"), "home folder of nobody"),
        (("build", "--model", "a" * 300, "--mem", "25%"), "no name of a model"),
    ],
    ids=["calib", "seed", "long out", "folder", "second target", "device", "home", "long model"],
)
def test_mistakes_are_refused_in_one_sentence(kvcompile, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = kvcompile(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert words in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("space", ["\u3000", "\u00a0", "\u200d"])
def test_a_name_that_no_artifact_can_hold_is_refused_before_profiling(
    kvcompile, model_folder, tmp_path, monkeypatch, space
) -> None:
    def started(*_: object, **__: object) -> None:
        raise AssertionError("calibration has begun")

    monkeypatch.setattr(calibration, "calibrate", started)
    folder = shutil.copytree(model_folder, tmp_path / f"ti{space}ny")
    out = tmp_path / "a.kvb"
    status, _, err = kvcompile("build", "--model", folder, "--mem", "50%", "--context", 64, "-o", out)
    assert status == 2
    assert "expected printable text" in err
    assert not out.exists()
