"""The decode step of all heads of a layer at once: every slot of the layer is a column of one matrix of logits.

Each query head is multiplied with the keys of all heads and what is not its own is masked out. That is more arithmetic
than needed and hardly more time, as a decode step waits for memory: the keys are read once either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcompile.kernels.blocks import blocks
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs import CODECS
from kvcompile.kernels.codecs import api as codecs
from kvcompile.kernels.layout import EXACT, HeadRow, LayerLayout
from kvcompile.kernels.ragged_decode.totals import Totals

INF = float("inf")


class Side(NamedTuple):
    """The heads of keys or values by codec, which is the order of columns."""

    order: list[int]
    """Storage positions by column."""
    capacity: list[int]
    """Slots, by column."""
    anchored: torch.Tensor
    """Columns int64 [anchors] of slot 0 of the heads that keep an exact copy of it, in the order of anchors."""
    plain: bool
    """No head is quantised."""


class Columns(NamedTuple):
    """What never changes about a layer."""

    keys: Side
    values: Side
    owner: torch.Tensor
    """f32 [H, H]: 0 where the head that owns the column (second) is the one that asks (first), else -inf."""
    counts: torch.Tensor
    """int64 [H]: slots of the heads in the order of key columns."""
    uniform: bool
    """All heads have one shape and are stored as they are."""


def _columns(layout: LayerLayout, device: torch.device) -> Columns:
    key = ("columns", device)
    if key not in layout.memo:
        keys, values = (_side(layout.rows, name, device) for name in ("k", "v"))
        heads = torch.arange(len(layout.rows), device=device)
        owner = torch.where(heads[:, None] == torch.tensor(keys.order, device=device), 0.0, -INF)
        uniform = len(layout.classes) == 1 and keys.plain and values.plain
        counts = torch.tensor(keys.capacity, device=device)
        layout.memo[key] = Columns(keys, values, owner, counts, uniform)
    columns: Columns = layout.memo[key]
    return columns


def _side(rows: Sequence[HeadRow], name: str, device: torch.device) -> Side:
    stored = [getattr(row, f"{name}_codec") for row in rows]
    order = [h for codec in (EXACT, *CODECS) for h in range(len(rows)) if stored[h] == codec]
    capacity = [rows[h].capacity for h in order]
    first = {h: sum(capacity[:i]) for i, h in enumerate(order)}
    anchors = {getattr(row, f"{name}_anchor"): first[h] for h, row in enumerate(rows)}
    anchored = torch.tensor([anchors[i] for i in range(max(anchors) + 1)], dtype=torch.int64, device=device)
    return Side(order, capacity, anchored, not any(stored))


def one_token(
    query: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    seen: Sequence[int],
    scaling: float,
    totals: Totals | None = None,
) -> torch.Tensor:
    """Attention [B, num_heads, D] of one stored token a sequence, `query` [B, num_heads, D]."""
    columns = _columns(layout, query.device)
    every = min(seen) >= max(columns.keys.capacity) and not layout.window
    if totals is None and columns.uniform and every:
        cls = layout.classes[0]
        k, v = keys.views(cls)[0], values.views(cls)[0]
        grouped = query.unflatten(1, (cls.count, -1))
        attended = scaled_dot_product_attention(grouped, k.to(query.dtype), v.to(query.dtype), scale=scaling)
        return attended.flatten(1, 2)
    size = sum(columns.keys.capacity)
    penalty = columns.owner.repeat_interleave(columns.counts, 1, output_size=size)
    unseen = None if every else ~_visible(columns, layout, seen, query.device)[:, None]
    if totals is None and columns.keys.plain and columns.values.plain:
        mask = penalty if unseen is None else penalty.masked_fill(unseen, -INF)
        mask = mask.to(query.dtype).repeat_interleave(query.shape[1] // layout.num_kv_heads, -2)
        stored = (t[:, None].to(query.dtype) for t in (keys.exact, values.exact))
        mask = mask[None, None] if mask.dim() == 2 else mask[:, None]
        return scaled_dot_product_attention(query[:, None], *stored, attn_mask=mask, scale=scaling)[:, 0]
    logits = _logits(query.float() * scaling, keys, columns.keys)
    if totals is not None:
        logits = totals.bent(logits.unflatten(1, (layout.num_kv_heads, -1))[:, :, :, None]).flatten(1, 3)
    by_head = logits.unflatten(1, (layout.num_kv_heads, -1))
    by_head += penalty[:, None]
    if unseen is not None:
        by_head.masked_fill_(unseen[:, :, None], -INF)
    if totals is not None:
        totals.logarithm = logits.logsumexp(-1)[..., None]
    weights = logits.softmax(-1)
    if columns.values.order != columns.keys.order:
        parts = dict(zip(columns.keys.order, weights.split(columns.keys.capacity, 2), strict=True))
        weights = torch.cat([parts[h] for h in columns.values.order], 2)
    return _mixed(weights, values, columns.values).to(query.dtype)


def _logits(query: torch.Tensor, keys: Buffers, side: Side) -> torch.Tensor:
    """Products [B, num_heads, columns] of `query` f32 [B, num_heads, D] with all keys."""
    out = query.new_empty(*query.shape[:2], sum(side.capacity))
    for start, stop, block in blocks(keys.exact):
        torch.bmm(query, block.mT, out=out[:, :, start:stop])
    for codec, first, last in _sections(keys):
        codecs.logits(query, *keys.parts(codec), codec, out[:, :, first:last])
    if len(side.anchored):
        out.index_copy_(2, side.anchored, query @ keys.anchors.float().mT)
    return out


def _mixed(weights: torch.Tensor, values: Buffers, side: Side) -> torch.Tensor:
    """Values [B, num_heads, D] weighted with f32 [B, num_heads, columns], a row of which has only its own head's."""
    out = weights.new_zeros(*weights.shape[:2], values.head_dim)
    if len(side.anchored):
        out.baddbmm_(weights.index_select(2, side.anchored), values.anchors.float())
        weights.index_fill_(2, side.anchored, 0.0)
    for start, stop, block in blocks(values.exact):
        out.baddbmm_(weights[:, :, start:stop], block)
    for codec, first, last in _sections(values):
        codecs.accumulate(weights[:, :, first:last], *values.parts(codec), codec, out)
    return out


def _sections(side: Buffers) -> Iterator[tuple[int, int, int]]:
    """The codecs in use, in the order of columns, with their first column and the one after the last."""
    first = side.exact.shape[1]
    for codec, region in side.regions.items():
        yield codec, first, first + region.rows
        first += region.rows


def _visible(columns: Columns, layout: LayerLayout, seen: Sequence[int], device: torch.device) -> torch.Tensor:
    """Whether a column is filled and inside the layer's window: bool [B, columns]."""
    capacity = columns.counts.repeat_interleave(columns.counts)
    first = (columns.counts.cumsum(0) - columns.counts).repeat_interleave(columns.counts)
    slot = torch.arange(len(first), device=device) - first
    count = torch.tensor(seen, device=device)[:, None]
    visible = slot < count
    if layout.window:
        # A sliding layer is one ring without sinks, so a slot holds the last token that is its number modulo the ring.
        token = count - 1 - (count - 1 - slot) % capacity
        visible &= token > count - 1 - layout.window
    return visible
