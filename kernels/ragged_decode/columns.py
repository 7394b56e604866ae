"""The decode step of all heads of a layer at once: every slot of the layer is a column of one matrix of logits.

Each query head is multiplied with the keys of all heads and what is not its own is masked out. That is more arithmetic
than needed and hardly more time, as a decode step waits for memory: the keys are read once either way. Codes are
multiplied as the integers that they are, in float32; scale and centre are applied to the logits and to the weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcompile.kernels.buffers import Stored
from kvcompile.kernels.layout import QUANTISED, HeadRow, LayerLayout

WIDTHS = (0, *QUANTISED)
INF = float("inf")
BLOCK = 1 << 19
"""Most numbers that are turned into float32 at a time, so that they are still in the cache when they are multiplied."""


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
    size = sum(columns.keys.capacity)
    penalty = columns.owner.repeat_interleave(columns.counts, 1, output_size=size)
    unseen = None if every else ~_visible(columns, layout, seen, query.device)[:, None]
    if columns.keys.plain and columns.values.plain:
        mask = penalty if unseen is None else penalty.masked_fill(unseen, -INF)
        mask = mask.to(query.dtype).repeat_interleave(query.shape[1] // layout.num_kv_heads, -2)
        stored = (t[:, None].to(query.dtype) for t in (keys.exact, values.exact))
        mask = mask[None, None] if mask.dim() == 2 else mask[:, None]
        return scaled_dot_product_attention(query[:, None], *stored, attn_mask=mask, scale=scaling)[:, 0]
    logits = _logits(query.float() * scaling, keys, columns.keys)
    by_head = logits.unflatten(1, (layout.num_kv_heads, -1))
    by_head += penalty[:, None]
    if unseen is not None:
        by_head.masked_fill_(unseen[:, :, None], -INF)
    weights = logits.softmax(-1)
    if columns.values.order != columns.keys.order:
        parts = dict(zip(columns.keys.order, weights.split(columns.keys.capacity, 2), strict=True))
        weights = torch.cat([parts[h] for h in columns.values.order], 2)
    return _mixed(weights, values, columns.values).to(query.dtype)


def _logits(query: torch.Tensor, keys: Stored, side: Side) -> torch.Tensor:
    """Products [B, num_heads, columns] of `query` f32 [B, num_heads, D] with all keys."""
    logits = query.new_empty(*query.shape[:2], sum(side.capacity))
    first = 0
    for start, stop, block in _blocks(keys.exact):
        torch.bmm(query, block.mT, out=logits[:, :, start:stop])
    first += keys.exact.shape[1]
    for width in QUANTISED:
        codes, scales = keys.codes[width], keys.scales[width].float()
        if not codes.shape[1]:
            continue
        mine = logits[:, :, first : first + codes.shape[1]]
        first += codes.shape[1]
        groups = scales.shape[2]
        for g, asked in enumerate(query.chunk(groups, 2)):
            part, into = codes.chunk(groups, 2)[g], mine if groups == 1 else torch.empty_like(mine)
            if width == 8:
                for start, stop, block in _blocks(part):
                    torch.bmm(asked, block.mT, out=into[:, :, start:stop])
            else:
                low, high = _nibble_factors(asked)
                for start, stop, byte, upper in _nibbles(part):
                    torch.bmm(low, byte.mT, out=into[:, :, start:stop])
                    into[:, :, start:stop].baddbmm_(high, upper.mT)
            into -= (2 ** (width - 1) - 0.5) * asked.sum(2, keepdim=True)
            into *= scales[:, None, :, g]
            if groups > 1:
                mine.copy_(into) if g == 0 else mine.add_(into)
    if len(side.anchored):
        logits.index_copy_(2, side.anchored, query @ keys.anchors.float().mT)
    return logits


def _mixed(weights: torch.Tensor, values: Stored, side: Side) -> torch.Tensor:
    """Values [B, num_heads, D] weighted with f32 [B, num_heads, columns], a row of which has only its own head's."""
    out = weights.new_zeros(*weights.shape[:2], values.head_dim)
    if len(side.anchored):
        out.baddbmm_(weights.index_select(2, side.anchored), values.anchors.float())
        weights.index_fill_(2, side.anchored, 0.0)
    for start, stop, block in _blocks(values.exact):
        out.baddbmm_(weights[:, :, start:stop], block)
    first = values.exact.shape[1]
    for width in QUANTISED:
        codes, scales = values.codes[width], values.scales[width].float()
        if not codes.shape[1]:
            continue
        mine = weights[:, :, first : first + codes.shape[1]]
        first += codes.shape[1]
        groups = scales.shape[2]
        for g, into in enumerate(out.chunk(groups, 2)):
            part = codes.chunk(groups, 2)[g]
            scaled = mine * scales[:, None, :, g]
            into -= (2 ** (width - 1) - 0.5) * scaled.sum(2, keepdim=True)
            if width == 8:
                for start, stop, block in _blocks(part):
                    into += scaled[:, :, start:stop] @ block
                continue
            for start, stop, byte, upper in _nibbles(part):
                high = scaled[:, :, start:stop] @ upper
                into[:, :, 0::2] += (scaled[:, :, start:stop] @ byte).sub_(high, alpha=16)
                into[:, :, 1::2] += high
    return out


class _Scratch(threading.local):
    """Memory of a thread for numbers that are needed at once and never again."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(self, name: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the shape of `like`, of any contents."""
        key = (name, dtype, like.device)
        held = self.held.get(key)
        if held is None or held.numel() < like.numel():
            held = self.held[key] = torch.empty(max(like.numel(), BLOCK), dtype=dtype, device=like.device)
        return held[: like.numel()].view(like.shape)


_scratch = _Scratch()


def _blocks(rows: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Rows [B, n, X] as float32, some at a time: first, after the last, and the rows."""
    step = max(1, BLOCK // (rows.shape[0] * rows.shape[2]))
    for start in range(0, rows.shape[1], step):
        block = rows[:, start : start + step]
        yield start, start + block.shape[1], _scratch.get("rows", block, torch.float32).copy_(block)


def _nibbles(codes: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Bytes [B, n, X] and their upper halves as float32, some at a time."""
    step = max(1, BLOCK // (codes.shape[0] * codes.shape[2]))
    for start in range(0, codes.shape[1], step):
        block = codes[:, start : start + step]
        upper = torch.bitwise_right_shift(block, 4, out=_scratch.get("upper", block, torch.uint8))
        yield (
            start,
            start + block.shape[1],
            _scratch.get("rows", block, torch.float32).copy_(block),
            _scratch.get("halves", block, torch.float32).copy_(upper),
        )


def _nibble_factors(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What to multiply bytes and upper halves with: as low = byte - 16 high, even low + odd high is the same as
    even byte + (odd - 16 even) high."""
    even, odd = query[:, :, 0::2], query[:, :, 1::2]
    return even.contiguous(), odd - 16 * even


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
