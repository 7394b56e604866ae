"""Neighbouring groups of a vector that are alike, which implementations treat as one array."""

from __future__ import annotations

from functools import cache
from itertools import groupby
from typing import NamedTuple

from kvcompile.kernels.codecs.base import Codec


class Stretch(NamedTuple):
    """`count` neighbouring groups of equal `size` and `bits`, from element `start` and byte `byte` on."""

    bits: int
    start: int
    size: int
    byte: int
    count: int


@cache
def stretches(codec: Codec, head_dim: int) -> tuple[Stretch, ...]:
    """The groups of a vector, those of a section together."""
    return tuple(
        Stretch(*first, len(alike))
        for alike in (list(part) for _, part in groupby(codec.split(head_dim), key=lambda g: (g.bits, g.size)))
        for first in alike[:1]
    )
