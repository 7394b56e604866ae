"""Stores on the device that the GPU kernels run on: a GPU where there is one, else the CPU, in the interpreter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch

from kvcompile.kernels import Buffers, HeadSpec, LayerLayout

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter's products of bfloat16 are wrong.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3} | ({torch.bfloat16: 2e-2} if GPU else {})
QUANTISED = LayerLayout.from_heads(
    [
        HeadSpec("full", 131, 4, 27, 8, 4), HeadSpec("scored", 5, 4, 1, 4, 4), HeadSpec("recent", 9, 0, 8, 16, 8),
        HeadSpec("scored", 40, 1, 8, 8, 8), HeadSpec("scored", 67, 2, 8, 4, 16),
    ]
)  # fmt: skip
FEW_BITS = LayerLayout.from_heads(
    [
        HeadSpec("full", 131, 4, 27, 67, 3), HeadSpec("scored", 5, 4, 1, 66, 2), HeadSpec("recent", 9, 0, 8, 65, 2),
        HeadSpec("scored", 40, 1, 8, 4, 3), HeadSpec("scored", 67, 2, 8, 8, 2), HeadSpec("scored", 33, 1, 8, 3, 66),
        HeadSpec("recent", 1, 0, 1, 2, 65), HeadSpec("scored", 36, 1, 8, 67, 67),
    ]
)  # fmt: skip


def sides(layout: LayerLayout, head_dim: int, dtype: torch.dtype, batch: int, seed: int = 0) -> list[Buffers]:
    """Keys and values, full of random vectors."""
    generator = torch.Generator().manual_seed(seed)
    stores = []
    for name in ("k_bits", "v_bits"):
        stored = Buffers(layout, [getattr(c, name) for c in layout.classes], head_dim, dtype, DEVICE, batch)
        for cls in layout.classes:
            slot = torch.arange(cls.capacity).expand(batch, cls.count, -1).to(DEVICE)
            new = torch.randn(batch, cls.count, cls.capacity, head_dim, generator=generator).to(DEVICE, dtype)
            stored.write(cls, new, slot, slot[:, :, :0], slot[:, :, :0])
            stored.write_anchor(cls, new, slot)
        stores.append(stored)
    return stores


def spread_over(first: Iterable[Any], second: Sequence[Any], *others: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases for `parametrize`: on a GPU all combinations of the axes. The interpreter is slow: there every combination
    of the others has one of the `second` axis, in turn, so that any two values of two axes still meet, if a third
    one is as long as that."""
    axes = [list(axis) for axis in (first, second, *others)]
    places = product(*(range(len(axis)) for axis in axes))
    chosen = [at for at in places if GPU or sum(at) % len(second) == 0]
    return [tuple(axis[i] for axis, i in zip(axes, at, strict=True)) for at in chosen]


def on_cpu(stored: Buffers) -> Buffers:
    """A copy for the reference."""
    copied = copy.deepcopy(stored)
    copied.exact, copied.anchors = copied.exact.cpu(), copied.anchors.cpu()
    copied.codes, copied.scales = copied.codes.cpu(), copied.scales.cpu()
    return copied
