"""What the kernels in Triton and in C are given of a side (keys or values), in the order of their parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvcompile.kernels.codecs import Codec
from kvcompile.kernels.codecs.int4 import CODEC as INT4
from kvcompile.kernels.codecs.int8 import CODEC as INT8

if TYPE_CHECKING:
    from kvcompile.kernels.buffers import Buffers
    from kvcompile.kernels.layout import LayerLayout

ORDER: tuple[Codec, ...] = (INT8, INT4)
"""The codecs that these kernels have parameters for; layers with others go through torch (`dispatch.knows`)."""

FIELDS = ("exact", *(f"{kind}{codec.bits}" for codec in ORDER for kind in ("codes", "scales")), "anchors")
"""Names of `tensors`, without the prefix of a side."""

SIZES = [
    f"{side}_{name}"
    for side in "kv"
    for name in ("rows", *(f"rows{c.bits}{s}" for c in ORDER for s in ("", "s")), "anchored")
]
"""Names of `rows` with the prefix of a side. They differ from layer to layer, and Triton would compile a kernel anew
for those that are a multiple of 16, and those that are 1."""


def tensors(side: Buffers) -> tuple[torch.Tensor, ...]:
    """Every buffer of a side, empty ones too: [batch, rows, X] each."""
    quantised = (part[codec.id] for codec in ORDER for part in (side.codes, side.scales))
    return (side.exact, *quantised, side.anchors)


def rows(side: Buffers) -> tuple[int, ...]:
    """From one sequence to the next in every one of `tensors`, in rows of it: in pages more than a sequence has. Rows
    and not numbers, so that a kernel knows that what it reads begins at a multiple of a row."""
    return tuple(t.stride(0) // t.shape[2] for t in tensors(side))


def head_table(layout: LayerLayout, device: torch.device) -> torch.Tensor:
    """The layout's rows (`HeadRow`), int32 [H, fields], on the device, made once."""
    key = ("heads", device)
    if key not in layout.memo:
        layout.memo[key] = torch.tensor(layout.rows, dtype=torch.int32, device=device)
    table: torch.Tensor = layout.memo[key]
    return table


def in_order(layout: LayerLayout, batch: int, device: torch.device) -> torch.Tensor:
    """Places int32 [batch] of sequences that are all that a store holds, on the device, made once."""
    key = ("places", batch, device)
    if key not in layout.memo:
        layout.memo[key] = torch.arange(batch, dtype=torch.int32, device=device)
    places: torch.Tensor = layout.memo[key]
    return places


def groups(head_dim: int) -> int:
    """Groups of a quantised vector, which are the same for all codecs in `ORDER`."""
    return ORDER[0].groups(head_dim)
