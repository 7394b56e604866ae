"""The whole of calibration: deterministic, hashed, from the installation's text or the user's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcompile.artifacts.errors import CalibrationError
from kvcompile.calibration import calibrate, python_text
from kvcompile.calibration.python_text import python_families


def test_the_installation_carries_three_kinds_of_text() -> None:
    families = {family.name: family for family in python_families()}
    assert list(families) == ["reference", "code", "docs"]
    assert all(len(family.documents) > 50 for family in families.values())
    assert "import" in families["code"].documents[0]()
    paths = [{document.args for document in families[name].documents} for name in ("code", "docs")]  # type: ignore[attr-defined]
    assert not paths[0] & paths[1]


def test_docstrings_are_read_and_not_run(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        '"""About."""\nraise SystemExit\nclass A:\n    """Of A."""\n    def f(self):\n        """Of f."""\n'
    )
    assert python_text._docstrings(source) == "sample\n\nAbout.\n\nsample.A\n\nOf A.\n\nsample.A.f\n\nOf f."
    source.write_text("def broken(:")
    assert python_text._docstrings(source) == ""


def test_the_same_seed_gives_the_same_calibration(tokenizer: Any) -> None:
    first, again, other = (calibrate(tokenizer, length=256, count=6, seed=seed, probes=2) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(first.windows, again.windows, strict=True))
    assert not any(np.array_equal(a.ids, b.ids) for a, b in zip(first.windows, other.windows, strict=True))


def test_lengths_cycle_and_every_family_has_a_longest_window(tokenizer: Any) -> None:
    calibration = calibrate(tokenizer, length=512, count=9, seed=0, probes=0)
    assert [len(window.ids) for window in calibration.windows] == [512, 256, 128] * 3
    assert {w.family for w in calibration.windows if len(w.ids) == 512} == {"reference", "code", "docs"}
    assert calibration.probes == ()


def test_the_description_is_json_and_tells_the_recipe(tokenizer: Any) -> None:
    calibration = calibrate(tokenizer, length=256, count=3, seed=5, probes=2)
    described = json.loads(json.dumps(calibration.describe()))
    assert described["sources"] == ["reference", "code", "docs"]
    assert described["lengths"] == [256, 128, 64]
    assert described["tokens"] == 448
    assert (described["seed"], described["probes"]) == (5, 2)
    assert described["sha256"] == calibration.sha256


def test_the_users_text_takes_the_place_of_ours(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time there was a kettle. " * 200)
    calibration = calibrate(tokenizer, length=256, count=3, seed=0, path=tmp_path, probes=2)
    assert calibration.families == ("user",)
    assert {window.family for window in calibration.windows} == {"user"}
    assert all("kettle" in tokenizer.decode(probe.prompt_ids) for probe in calibration.probes)


def test_an_installation_without_text_is_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CalibrationError, match="give text with --calib PATH"):
        calibrate(tokenizer, length=256, count=3, seed=0)
