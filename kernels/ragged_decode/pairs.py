"""Pairs of codecs, of keys and of values, in one number: a kernel is compiled for those of a layer and no others.

Codecs are those of `arguments.ORDER`, after the cache dtype; the pair of places K and V there is bit `COUNT * K + V`.
"""

from __future__ import annotations

from collections.abc import Iterable

import triton

from kvcompile.kernels.arguments import ORDER
from kvcompile.kernels.layout import EXACT

CODECS = (EXACT, *(codec.id for codec in ORDER))
COUNT = len(CODECS)


def pairs_of(pairs: Iterable[tuple[int, int]]) -> int:
    """The number that stands for these pairs of ids."""
    return sum(1 << bit for bit in {COUNT * CODECS.index(k) + CODECS.index(v) for k, v in pairs})


def codecs_of(pairs: int) -> tuple[set[int], set[int]]:
    """The codecs of keys, and those of values."""
    found = _pairs(pairs)
    return {k for k, _ in found} - {EXACT}, {v for _, v in found} - {EXACT}


@triton.constexpr_function
def pair_count(pairs):
    """How many there are."""
    return len(_pairs(pairs))


@triton.constexpr_function
def key_codec(pairs, i):
    """The id of the keys' codec in pair i."""
    return _pairs(pairs)[i][0]


@triton.constexpr_function
def value_codec(pairs, i):
    """The id of the values' codec in pair i."""
    return _pairs(pairs)[i][1]


@triton.constexpr_function
def _pairs(pairs):
    return [(CODECS[bit // COUNT], CODECS[bit % COUNT]) for bit in range(COUNT * COUNT) if pairs >> bit & 1]
