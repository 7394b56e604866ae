"""Sets of codecs as the bits of a number, in the order of `arguments.ORDER`: a Triton kernel that stores is compiled
for one of a few sets, which the layers of a model share. A program stores one head, and never runs what is for other
codecs; a kernel for every layer's own set would have to be compiled as often as there are sets."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import triton

from kvcompile.kernels.arguments import ORDER

IDS = tuple(codec.id for codec in ORDER)
USUAL = (("int8", "int4"),) * 2, (("int8", "int4", "mix3", "mix2", "mix1"), ("int8", "int4", "int3", "int2"))
"""Codecs of keys and of values that kernels are compiled for: those of plans of many bits, and those of few."""


@lru_cache
def codec_sets(codecs: tuple[Iterable[int], ...], head_dim: int) -> dict[str, int]:
    """The sets of keys and of values that hold a layer's `codecs`, as the constants by which kernels know them."""
    own = [set(side) & set(IDS) for side in codecs]
    fitting = {codec.name: codec.id for codec in ORDER if codec.fits(head_dim)}
    usual = [[{fitting[name] for name in side if name in fitting} for side in sides] for sides in USUAL]
    held = next((sets for sets in usual if all(a <= b for a, b in zip(own, sets, strict=True))), own)
    # Where nothing is quantised there is nothing to compile for.
    k, v = (sum(1 << i for i, id in enumerate(IDS) if id in side) for side in (held if any(own) else own))
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
