"""Calibration: the text and the questions a model is profiled on, without a network."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompile.artifacts.errors import CalibrationError
from kvcompile.calibration.probes import Probe, draw_probes
from kvcompile.calibration.python_text import python_families
from kvcompile.calibration.user import user_family
from kvcompile.calibration.windows import LEAST_TOKENS, Window, draw_windows

__all__ = ["Calibration", "Probe", "Window", "calibrate"]

LENGTH_CYCLE = (1, 2, 4)
"""Windows are in turn whole, half and quarter length: BaKlaVa profiles prompts of several lengths."""


@dataclass(frozen=True)
class Calibration:
    """Windows and probes drawn with a seed from the named families; `sha256` is over all token ids and the seed."""

    families: tuple[str, ...]
    windows: tuple[Window, ...]
    probes: tuple[Probe, ...]
    seed: int
    sha256: str

    def describe(self) -> dict[str, Any]:
        """What an artifact says of its calibration, as a JSON object."""
        return {
            "sources": list(self.families),
            # The built-in text is that of the Python installation, so its version belongs to the recipe.
            "python": platform.python_version(),
            "seed": self.seed,
            "sha256": self.sha256,
            "lengths": [len(window.ids) for window in self.windows],
            "tokens": sum(len(window.ids) for window in self.windows),
            "probes": len(self.probes),
        }


def calibrate(
    tokenizer: Any, *, length: int, count: int, seed: int, path: Path | None = None, probes: int = 8
) -> Calibration:
    """Draw `count` windows of up to `length` tokens, and `probes` retrieval probes of about `length` tokens.

    The text is the Python installation's, or with `path` (a file or folder) the user's instead; the probes' facts and
    questions are always our own. Raises CalibrationError for a path without usable text and for too little text.
    """
    families = [user_family(path)] if path is not None else python_families()
    if not families:
        raise CalibrationError(
            "this Python installation carries no sources to calibrate on: give text with --calib PATH"
        )
    lengths = [max(length // LENGTH_CYCLE[i % len(LENGTH_CYCLE)], min(length, LEAST_TOKENS)) for i in range(count)]
    drawn = draw_windows(tokenizer, families, lengths, seed)
    asked = draw_probes(tokenizer, families, length, probes, seed)
    return Calibration(tuple(f.name for f in families), tuple(drawn), tuple(asked), seed, _digest(drawn, asked, seed))


def _digest(drawn: list[Window], asked: list[Probe], seed: int) -> str:
    digest = hashlib.sha256(str(seed).encode())
    arrays = [w.ids for w in drawn] + [ids for probe in asked for ids in (probe.prompt_ids, probe.answer_ids)]
    for ids in arrays:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.astype("<i8").tobytes())
    return digest.hexdigest()
