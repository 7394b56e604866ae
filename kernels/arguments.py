"""What the kernels in Triton and in C are given of a side (keys or values), in the order of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from kvcompile.kernels.codecs import CODECS, Codec
from kvcompile.kernels.layout import HeadRow
from kvcompile.kernels.regions import starts, units

if TYPE_CHECKING:
    from kvcompile.kernels.buffers import Buffers
    from kvcompile.kernels.layout import LayerLayout

ORDER: tuple[Codec, ...] = tuple(codec for codec in CODECS.values() if codec.has("triton"))
"""The codecs that the kernels in Triton know; layers with others go through torch (`dispatch.knows`)."""

FIELDS = ("exact", "codes", "scales", "anchors")
"""Names of `tensors`, without the prefix of a side."""

SIZES = [f"{side}_{name}" for side in "kv" for name in ("rows", "codes_step", "scales_step", "anchored")]
"""Names of `steps` with the prefix of a side. They differ from layer to layer, and Triton would compile a kernel anew
for those that are a multiple of 16, and those that are 1."""

UNITS = [f"{side}_{name}_unit" for side in "kv" for name in ("codes", "scales")]
"""Names of `units` with the prefix of a side, where they are no constants: of kernels that store, which gain nothing by
knowing them."""

COLUMNS = (*HeadRow._fields, "k_codes", "k_scales", "v_codes", "v_scales")
"""Columns of `head_table`."""


def tensors(side: Buffers) -> tuple[torch.Tensor, ...]:
    """Every buffer of a side, empty ones too."""
    return (side.exact, side.codes, side.scales, side.anchors)


def steps(side: Buffers) -> tuple[int, ...]:
    """From one sequence to the next in every one of `tensors`: in rows, in those of codes and scales in `units`. Not in
    numbers, so that a kernel knows of what all that it reads begins at a multiple; in pages more than a sequence has.
    """
    unit = units(side.regions, side.head_dim)
    return (
        side.exact.stride(0) // side.head_dim, side.codes.stride(0) // unit.codes,
        side.scales.stride(0) // unit.scales, side.anchors.stride(0) // side.head_dim,
    )  # fmt: skip


def head_rows(layout: LayerLayout, head_dim: int) -> list[list[int]]:
    """The layout's rows (`HeadRow`), and where heads begin in the flat buffers of codes and scales, in `units`: those
    of `COLUMNS` for every head."""
    rows = [list(row) for row in layout.rows]
    for name, codecs in zip(("k_bits", "v_bits"), layout.side_codecs, strict=True):
        unit = units(codecs, head_dim)
        found = starts(layout, [getattr(c, name) for c in layout.classes], head_dim)
        for row, start in zip(rows, found, strict=True):
            row += [start.codes // unit.codes, start.scales // unit.scales]
    return rows


def head_table(layout: LayerLayout, head_dim: int, device: torch.device) -> torch.Tensor:
    """`head_rows` as int32 [H, columns], on the device, made once."""
    key = ("heads", head_dim, device)
    if key not in layout.memo:
        layout.memo[key] = torch.tensor(head_rows(layout, head_dim), dtype=torch.int32, device=device)
    table: torch.Tensor = layout.memo[key]
    return table


def unit_sizes(codecs: Sequence[Iterable[int]], head_dim: int) -> dict[str, int]:
    """`units` of keys and of values with these codecs, as the constants by which Triton kernels know them."""
    k, v = (units(side, head_dim) for side in codecs)
    return {"KU": k.codes, "KS": k.scales, "VU": v.codes, "VS": v.scales}


def in_order(layout: LayerLayout, batch: int, device: torch.device) -> torch.Tensor:
    """Places int32 [batch] of sequences that are all that a store holds, on the device, made once."""
    key = ("places", batch, device)
    if key not in layout.memo:
        layout.memo[key] = torch.arange(batch, dtype=torch.int32, device=device)
    places: torch.Tensor = layout.memo[key]
    return places
