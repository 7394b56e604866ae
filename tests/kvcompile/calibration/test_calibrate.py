"""The whole of calibration: deterministic, hashed, from the installation's text or the user's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcompile.artifacts.errors import CalibrationError
from kvcompile.calibration import Calibration, calibrate, python_text
from kvcompile.calibration.authored import authored_families
from kvcompile.calibration.python_text import python_families

NAMES = ("code", "reference", "dialogue", "essay", "paper")


def test_the_installation_carries_two_kinds_of_text() -> None:
    families = {family.name: family for family in python_families()}
    assert list(families) == ["code", "reference"]
    assert all(len(family.documents) > 50 for family in families.values())
    assert any("import" in document() for document in families["code"].documents[:5])


def test_our_own_texts_are_varied_and_clean() -> None:
    families = authored_families()
    assert [family.name for family in families] == ["dialogue", "essay", "paper"]
    paragraphs = []
    for family in families:
        texts = [document() for document in family.documents]
        assert len(texts) >= 5
        assert sum(len(text.split()) for text in texts) > 2000
        paragraphs += [part for text in texts for part in text.split("\n") if len(part) > 40]
    assert len(paragraphs) == len(set(paragraphs))


def test_docstrings_are_read_and_not_run(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        '"""About."""\nraise SystemExit\nclass A:\n    """Of A."""\n    def f(self):\n        """Of f."""\n'
    )
    assert python_text._docstrings(source) == "sample\n\nAbout.\n\nsample.A\n\nOf A.\n\nsample.A.f\n\nOf f."
    source.write_text("def broken(:")
    assert python_text._docstrings(source) == ""


def draw(tokenizer: Any, **options: Any) -> Calibration:
    return calibrate(tokenizer, **{"length": 256, "fit": 1, "measure": 1, "probes": 2, "seed": 0, **options})


def test_the_same_seed_gives_the_same_calibration(tokenizer: Any) -> None:
    first, again, other = (draw(tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    for a, b, c in zip(first.measure, again.measure, other.measure, strict=True):
        assert np.array_equal(a.context, b.context)
        assert not np.array_equal(a.context, c.context)


def test_every_family_takes_its_turn(tokenizer: Any) -> None:
    calibration = draw(tokenizer, fit=2, measure=1)
    assert calibration.families == NAMES
    assert [episode.family for episode in calibration.fit] == [*NAMES, *NAMES]
    assert [episode.family for episode in calibration.measure] == [*NAMES]
    assert len(calibration.probes) == 2


def test_fewer_families_leave_the_users_in(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time there was a kettle. " * 200)
    calibration = draw(tokenizer, path=tmp_path, every=3)
    assert calibration.families == (*NAMES[::3], "user")
    assert [episode.family for episode in calibration.fit] == [*NAMES[::3], "user"]
    assert [episode.family for episode in calibration.measure] == [*NAMES[::3], "user"]


def test_what_is_fitted_on_is_not_measured_on(tokenizer: Any) -> None:
    calibration = draw(tokenizer, length=512)
    for one, two in zip(calibration.fit, calibration.measure, strict=True):
        assert one.family == two.family
        pieces = (np.lib.stride_tricks.sliding_window_view(episode.context, 60) for episode in (one, two))
        fitted, measured = ({tuple(piece) for piece in views.tolist()} for views in pieces)
        assert not fitted & measured


def test_the_description_is_json_and_tells_the_recipe(tokenizer: Any) -> None:
    calibration = draw(tokenizer, seed=5)
    described = json.loads(json.dumps(calibration.describe()))
    assert described["sources"] == [*NAMES]
    assert (described["context"], described["episodes"], described["probes"]) == (256, 10, 2)
    assert described["tokens"] > 10 * 256
    assert described["sha256"] == calibration.sha256


def test_the_users_text_comes_beside_ours(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once upon a time there was a kettle. " * 200)
    calibration = draw(tokenizer, path=tmp_path)
    assert calibration.families == (*NAMES, "user")
    mine = [episode for episode in calibration.measure if episode.family == "user"]
    assert mine
    assert all("kettle" in tokenizer.decode(episode.context) for episode in mine)


def test_too_little_text_of_the_users_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Once.")
    with pytest.raises(CalibrationError, match=r"the text \(user\) is too short"):
        draw(tokenizer, path=tmp_path)


def test_an_installation_without_text_still_has_ours(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert draw(tokenizer).families == ("dialogue", "essay", "paper")
