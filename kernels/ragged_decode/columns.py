"""The decode step of all heads of a layer at once: every slot of the layer is a column of one matrix of logits.

Each query head is multiplied with the keys of all heads and what is not its own is masked out. That is more arithmetic
than needed and hardly more time, as a decode step waits for memory: the keys are read once either way. Codes are
multiplied as the integers that they are, in float32; scale and centre are applied to the logits and to the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcompile.kernels.layout import QUANTISED, HeadRow, LayerLayout
from kvcompile.kernels.stored import Stored

WIDTHS = (0, *QUANTISED)
INF = float("inf")


class Side(NamedTuple):
    """The heads of keys or values by width, which is the order of columns."""

    order: list[int]
    """Storage positions by column."""
    capacity: list[int]
    """Slots, by column."""
    anchored: torch.Tensor
    """Columns int64 [anchors] of slot 0 of the heads that keep an exact copy of it, in the order of anchors."""
    plain: bool
    """No head is rounded."""


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
    widths = [getattr(row, f"{name}_width") for row in rows]
    order = [h for width in WIDTHS for h in range(len(rows)) if widths[h] == width]
    capacity = [rows[h].capacity for h in order]
    first = {h: sum(capacity[:i]) for i, h in enumerate(order)}
    anchors = {getattr(row, f"{name}_anchor"): first[h] for h, row in enumerate(rows)}
    anchored = torch.tensor([anchors[i] for i in range(max(anchors) + 1)], dtype=torch.int64, device=device)
    return Side(order, capacity, anchored, not any(widths))


def one_token(
    query: torch.Tensor, keys: Stored, values: Stored, layout: LayerLayout, seen: Sequence[int], scaling: float
) -> torch.Tensor:
    """Attention [B, num_heads, D] of one stored token a sequence, `query` [B, num_heads, D]."""
    columns = _columns(layout, query.device)
    every = min(seen) >= max(columns.keys.capacity) and not layout.window
    if columns.uniform and every:
        cls = layout.classes[0]
        k, v = keys.views(cls)[0], values.views(cls)[0]
        grouped = query.unflatten(1, (cls.count, -1))
        attended = scaled_dot_product_attention(grouped, k.to(query.dtype), v.to(query.dtype), scale=scaling)
        return attended.flatten(1, 2)
    logits = _logits(query.float() * scaling, keys, columns.keys)
    by_head = logits.unflatten(1, (layout.num_kv_heads, -1))
    by_head += columns.owner.repeat_interleave(columns.counts, 1, output_size=logits.shape[2])[:, None]
    if not every:
        by_head.masked_fill_(~_visible(columns, layout, seen, query.device)[:, None, None], -INF)
    weights = logits.softmax(-1)
    if columns.values.order != columns.keys.order:
        parts = dict(zip(columns.keys.order, weights.split(columns.keys.capacity, 2), strict=True))
        weights = torch.cat([parts[h] for h in columns.values.order], 2)
    return _mixed(weights, values, columns.values).to(query.dtype)


def _logits(query: torch.Tensor, keys: Stored, side: Side) -> torch.Tensor:
    """Products [B, num_heads, columns] of `query` f32 [B, num_heads, D] with all keys."""
    parts = [query @ keys.exact.float().mT] if keys.exact.shape[1] else []
    for width in QUANTISED:
        codes, scales = keys.codes[width], keys.scales[width].float()
        if not codes.shape[1]:
            continue
        total = None
        for g, asked in enumerate(query.chunk(scales.shape[2], 2)):
            centre = (2 ** (width - 1) - 0.5) * asked.sum(2, keepdim=True)
            part = codes.chunk(scales.shape[2], 2)[g]
            if width == 8:
                products = asked @ part.float().mT
            else:
                # low + 16 high is the byte itself, so one mask or shift is enough.
                even, odd = asked[:, :, 0::2], asked[:, :, 1::2]
                products = even @ (part & 15).float().mT
                products += odd @ (part >> 4).float().mT
            products -= centre
            products *= scales[:, None, :, g]
            total = products if total is None else total.add_(products)
        assert total is not None
        parts.append(total)
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    if len(side.anchored):
        logits.index_copy_(2, side.anchored, query @ keys.anchors.float().mT)
    return logits


def _mixed(weights: torch.Tensor, values: Stored, side: Side) -> torch.Tensor:
    """Values [B, num_heads, D] weighted with f32 [B, num_heads, columns], a row of which has only its own head's."""
    out = None
    if len(side.anchored):
        out = weights.index_select(2, side.anchored) @ values.anchors.float()
        weights = weights.index_fill(2, side.anchored, 0.0)
    first = values.exact.shape[1]
    if first:
        exact = weights[:, :, :first] @ values.exact.float()
        out = exact if out is None else out.add_(exact)
    for width in QUANTISED:
        codes, scales = values.codes[width], values.scales[width].float()
        if not codes.shape[1]:
            continue
        mine = weights[:, :, first : first + codes.shape[1]]
        first += codes.shape[1]
        parts = []
        for g, part in enumerate(codes.chunk(scales.shape[2], 2)):
            scaled = mine * scales[:, None, :, g]
            centre = (2 ** (width - 1) - 0.5) * scaled.sum(2, keepdim=True)
            if width == 8:
                parts.append((scaled @ part.float()).sub_(centre))
            else:
                low, high = scaled @ (part & 15).float(), scaled @ (part >> 4).float()
                parts.append(torch.stack([low, high], 3).flatten(2).sub_(centre))
        rounded = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        out = rounded if out is None else out.add_(rounded)
    assert out is not None
    return out


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
