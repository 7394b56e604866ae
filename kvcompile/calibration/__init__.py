"""Calibration: the text and the questions a model is profiled on, without a network."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts.errors import CalibrationError
from kvcompile.calibration.authored import authored_families
from kvcompile.calibration.episodes import QUOTES, Episode, FollowUp, draw_episodes
from kvcompile.calibration.family import Family, Stream
from kvcompile.calibration.probes import Probe, draw_probes
from kvcompile.calibration.python_text import python_families
from kvcompile.calibration.user import user_family

__all__ = ["Calibration", "Episode", "FollowUp", "Probe", "calibrate", "check_length", "draw_episodes"]

LEAST_TOKENS = 64
"""Less text than this says nothing about a cache."""


@dataclass(frozen=True)
class Calibration:
    """Episodes to fit on and others to measure on, and probes, drawn with a seed from the named families; `sha256` is
    over all token ids and the seed."""

    families: tuple[str, ...]
    fit: tuple[Episode, ...]
    measure: tuple[Episode, ...]
    probes: tuple[Probe, ...]
    seed: int
    sha256: str

    def describe(self) -> dict[str, Any]:
        """What an artifact says of its calibration, as a JSON object."""
        return {
            "sources": list(self.families),
            # Part of the text is that of the Python installation, so its version belongs to the recipe.
            "python": platform.python_version(),
            "seed": self.seed,
            "sha256": self.sha256,
            "context": max(len(episode.context) for episode in self.measure),
            "episodes": len(self.fit) + len(self.measure),
            "tokens": sum(len(ids) for ids in _episode_ids(self.fit + self.measure)),
            "probes": len(self.probes),
        }


def calibrate(
    tokenizer: Any,
    *,
    length: int,
    fit: int,
    measure: int,
    probes: int,
    seed: int,
    path: str | os.PathLike[str] | None = None,
    every: int = 1,
    quotes: int = QUOTES,
) -> Calibration:
    """Draw `fit` and `measure` episodes of each family, with contexts of `length` tokens, and `probes` retrieval probes
    of half that length. Of the families that are there without `path`, one in `every` is taken; each episode to measure
    on asks for so many `quotes`.

    No document is used both to fit and to measure, but for families too small to part. The families are what the Python
    installation carries, texts of our own, and with `path` (a file or folder) the user's text beside them, so that a
    plan for it does not forget everything else. Raises CalibrationError for a path without usable text.
    """
    families = (python_families() + authored_families())[::every]
    if path is not None:
        families.append(user_family(Path(path)))
    check_length(tokenizer, families[-1], LEAST_TOKENS)
    drawn = [
        tuple(
            draw_episodes(
                tokenizer, families, length, count * len(families), seed, replay=replay, part=part, quotes=quotes
            )
        )
        for count, replay, part in ((fit, True, (0, 2)), (measure, False, (1, 2)))
    ]
    asked = tuple(draw_probes(tokenizer, families, max(length // 2, 1), probes, seed))
    names = tuple(family.name for family in families)
    return Calibration(names, drawn[0], drawn[1], asked, seed, _digest(drawn[0] + drawn[1], asked, seed))


def check_length(tokenizer: Any, family: Family, least: int) -> None:
    """Refuse a family of fewer than `least` tokens.

    Raises:
        CalibrationError: there are fewer.
    """
    found = len(Stream(tokenizer, family, "check").take(least))
    if found < least:
        raise CalibrationError(
            f"the text ({family.name}) is too short: it has {found} tokens, expected at least {least}, better thousands"
        )


def _episode_ids(episodes: tuple[Episode, ...]) -> Iterator[NDArray[np.int64]]:
    for episode in episodes:
        yield episode.context
        for one in episode.follow_ups:
            yield one.ids


def _digest(episodes: tuple[Episode, ...], asked: tuple[Probe, ...], seed: int) -> str:
    digest = hashlib.sha256(str(seed).encode())
    arrays = [*_episode_ids(episodes), *(ids for probe in asked for ids in (probe.prompt_ids, probe.answer_ids))]
    for ids in arrays:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.astype("<i8").tobytes())
    return digest.hexdigest()
