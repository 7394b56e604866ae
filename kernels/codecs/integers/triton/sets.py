"""Sets of codecs as the bits of a number, in the order of `arguments.ORDER`: a Triton kernel that stores is compiled
for those of a layer and no others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import triton

from kvcompile.kernels.arguments import ORDER

IDS = tuple(codec.id for codec in ORDER)


def codec_sets(codecs: Sequence[Iterable[int]]) -> dict[str, int]:
    """Those of keys and of values, as the constants by which kernels know them."""
    k, v = (sum(1 << i for i, id in enumerate(IDS) if id in set(side)) for side in codecs)
    return {"K_CODECS": k, "V_CODECS": v}


@triton.constexpr_function
def codec_count(codecs):
    """How many a set has."""
    return len(_codecs(codecs))


@triton.constexpr_function
def codec_at(codecs, i):
    """The id of codec i of a set."""
    return _codecs(codecs)[i]


@triton.constexpr_function
def _codecs(codecs):
    return [id for i, id in enumerate(IDS) if codecs >> i & 1]
