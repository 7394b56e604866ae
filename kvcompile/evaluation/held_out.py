"""The text that quality is measured on: the user's, or documents that no calibration reads."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from kvcompile.calibration import check_length
from kvcompile.calibration.authored import families_in
from kvcompile.calibration.episodes import CONTINUATION
from kvcompile.calibration.family import Family
from kvcompile.calibration.python_text import held_out_python_families
from kvcompile.calibration.user import user_family


def evaluation_families(tokenizer: Any, length: int, path: Path | None) -> list[Family]:
    """What to measure on: the user's text at `path`, or held-out documents of the kinds that calibration draws from.

    Of the standard library these are parts that no calibration reads, the rest was written for this purpose
    (`evaluation/texts`): whatever the seed, no document of theirs is one that a model was profiled on.

    Raises:
        CalibrationError: a path without usable text, or with too little for one context of `length` tokens and its
            continuation.
    """
    if path is None:
        return held_out_python_families() + families_in(files("kvcompile.evaluation") / "texts")
    family = user_family(path)
    check_length(tokenizer, family, length + min(CONTINUATION, length // 4))
    return [family]


def described(families: list[Family], path: Path | None) -> str:
    """The text in words, for tables and reports."""
    return f"your text: {path}" if path is not None else f"held-out texts: {', '.join(one.name for one in families)}"
