"""Ragged decoding in torch.

Several new tokens go class by class through `scaled_dot_product_attention`. The step of a single token has its own way
(`columns`): all heads of the layer in a few products, as a call for every head would cost more than what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcompile.artifacts import MASK_ELEMENTS
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.layout import HeadClass, LayerLayout
from kvcompile.kernels.ragged_decode.columns import one_token
from kvcompile.kernels.ragged_decode.totals import Totals
from kvcompile.kernels.softmax import by_group


def ragged_decode(
    query: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    seen: Sequence[int] | torch.Tensor,
    scaling: float,
    new_keys: torch.Tensor | None,
    new_values: torch.Tensor | None,
    new_mask: torch.Tensor | None,
    new_pad: torch.Tensor | None = None,
    totals: Totals | None = None,
) -> torch.Tensor:
    """See `api.ragged_decode`."""
    seen = seen.tolist() if isinstance(seen, torch.Tensor) else seen
    if new_keys is not None and new_values is not None:
        new = (new_keys, new_values, new_mask, new_pad)
        return _several_tokens(query, keys, values, layout, seen, scaling, *new, totals)
    return one_token(query.squeeze(2), keys, values, layout, seen, scaling, totals).unsqueeze(2)


def _several_tokens(
    query: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    seen: Sequence[int],
    scaling: float,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    new_mask: torch.Tensor | None,
    new_pad: torch.Tensor | None,
    totals: Totals | None,
) -> torch.Tensor:
    batch, num_heads, length, _ = query.shape
    group, total = num_heads // layout.num_kv_heads, new_keys.shape[2]
    grouped = query.unflatten(1, (layout.num_kv_heads, group))
    out = torch.empty_like(grouped)
    logarithm = torch.empty(*grouped.shape[:4], dtype=torch.float32, device=query.device)
    alike = new_mask is None and new_pad is None and min(seen) == max(seen)
    masked = seen[:1] if alike else seen  # sequences that have masks of their own
    for cls in layout.classes:
        filled = min(max(seen), cls.capacity)
        stored_k, stored_v = (side.read(cls, filled, query.dtype) for side in (keys, values))
        # Logits of every sequence and head where they are formed, else one mask for all heads.
        formed = len(masked) if totals is None else batch * cls.count
        block = max(1, MASK_ELEMENTS // (formed * group * (filled + total)))
        for t in range(0, length, block):
            rows = grouped[:, cls.heads, :, t : t + block]
            start = total - length + t
            new = _new_rows(start, start + rows.shape[3], layout.window, len(masked), new_mask, new_pad, query.device)
            mask = torch.cat([_stored_rows(cls, filled, layout.window, masked, new), new.visible], dim=3)
            k = torch.cat([stored_k, new_keys[:, cls.heads, new.columns]], dim=2)
            v = torch.cat([stored_v, new_values[:, cls.heads, new.columns]], dim=2)
            if totals is not None:
                now = (slice(None), cls.heads, slice(None), slice(t, t + block))
                out[now], logarithm[now] = _summed(rows, k, v, mask, scaling, totals, now)
                continue
            # Query heads of a group and their tokens are rows of one product, so K and V are not repeated.
            attended = scaled_dot_product_attention(
                rows.flatten(2, 3), k, v, attn_mask=mask.repeat(1, 1, group, 1), scale=scaling
            )
            out[:, cls.heads, :, t : t + block] = attended.unflatten(2, (group, -1))
    if totals is not None:
        totals.logarithm = logarithm.flatten(1, 2)
    return out.flatten(1, 2)


def _summed(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    totals: Totals,
    where: tuple[slice, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `rows` [B, heads, group, T, D], those at `where` of all, and the logarithms of their sums."""
    logits = totals.bent(by_group(rows.float(), keys.float().mT) * scaling, where)
    logits = logits.masked_fill(~mask[:, :, None], torch.finfo(logits.dtype).min)  # finite for padding too
    return by_group(logits.softmax(-1), values.float()).to(rows.dtype), logits.logsumexp(-1)


class _Rows(NamedTuple):
    """A block of n queries: `number` int64 [B, n] of their tokens among the new ones, padding not counted, and which of
    the new ones at `columns` they see, `visible` bool [B, 1, n, columns]."""

    number: torch.Tensor
    columns: slice
    visible: torch.Tensor


def _new_rows(
    start: int,
    stop: int,
    window: int,
    batch: int,
    new_mask: torch.Tensor | None,
    new_pad: torch.Tensor | None,
    device: torch.device,
) -> _Rows:
    """Of the new tokens `start` .. `stop` - 1."""
    if new_mask is not None:
        new_mask = new_mask.expand(batch, -1, -1, -1)
        number = new_mask[:, 0].diagonal(dim1=1, dim2=2).cumsum(1) - 1
        return _Rows(number[:, start:stop], slice(None), new_mask[:, :, start:stop])
    first = max(0, start - window + 1) if window else 0
    row, column = torch.arange(start, stop, device=device), torch.arange(first, stop, device=device)
    visible = (column <= row[:, None])[None]
    if window:
        visible = visible & (column > row[:, None] - window)
    if new_pad is None:
        new_pad = torch.zeros(batch, dtype=torch.int64, device=device)
    # Padding sees itself: a row without any would be no number.
    visible = visible & ((column >= new_pad[:, None, None]) | (column == row[:, None]))
    return _Rows(row - new_pad[:, None], slice(first, stop), visible[:, None])


def _stored_rows(cls: HeadClass, filled: int, window: int, seen: Sequence[int], new: _Rows) -> torch.Tensor:
    """Which of the `filled` slots a block of queries sees: bool [B, 1, n, filled]."""
    device = new.number.device
    slot = torch.arange(filled, device=device)
    count = torch.tensor(seen, device=device).view(-1, 1, 1, 1)
    mask = slot < count
    if window:
        # A sliding layer is one ring without sinks, so a slot holds the last token that is its number modulo the ring.
        token = count - 1 - (count - 1 - slot) % cls.capacity
        mask = mask & (token > count + new.number[:, None, :, None] - window)
    return mask.expand(-1, -1, new.number.shape[1], -1)
