"""Windows of text for profiling: several families, several lengths, no passage twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts.errors import CalibrationError
from kvcompile.calibration.family import Family, Stream, opening

LEAST_TOKENS = 64
"""A shorter passage says nothing about a cache."""


@dataclass(frozen=True)
class Window:
    """A passage of one family: `ids` i64 [n], with the BOS token where the tokenizer puts one before a plain text."""

    family: str
    ids: NDArray[np.int64] = field(compare=False)


def draw_windows(tokenizer: Any, families: Sequence[Family], lengths: Sequence[int], seed: int) -> list[Window]:
    """One window for each of `lengths` (tokens, BOS included), the families in turn.

    A family that is used up is passed over; where all of them are, windows get shorter and then fewer. Raises
    CalibrationError where the text does not fill one window of 64 tokens.
    """
    streams = [Stream(tokenizer, family, f"{seed}:windows") for family in families]
    bos = opening(tokenizer)
    drawn: list[Window] = []
    for number, length in enumerate(lengths):
        # One family further after each round, else lengths in a cycle would give every family always the same one.
        first = number + number // len(families)
        for turn in range(len(families)):
            place = (first + turn) % len(families)
            ids = np.concatenate([bos, streams[place].take(length - len(bos))])
            if len(ids) >= min(LEAST_TOKENS, length):
                drawn.append(Window(families[place].name, ids))
                break
    if not drawn:
        names = " and ".join(family.name for family in families)
        raise CalibrationError(
            f"the calibration text ({names}) is too short: expected at least {LEAST_TOKENS} tokens, better thousands"
        )
    return drawn
