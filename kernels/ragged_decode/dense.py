"""Ragged decoding in torch.

Several new tokens go class by class through `scaled_dot_product_attention`. The step of a single token has its own way
(`columns`): all heads of the layer in a few products, as a call for every head would cost more than what it computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.layout import HeadClass, LayerLayout
from kvcompile.kernels.ragged_decode.columns import one_token

MASK_ELEMENTS = 1 << 24
"""Most elements of one mask; longer runs of new tokens go through in blocks of queries."""


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
) -> torch.Tensor:
    """See `api.ragged_decode`."""
    seen = seen.tolist() if isinstance(seen, torch.Tensor) else seen
    if new_keys is not None and new_values is not None:
        return _several_tokens(query, keys, values, layout, seen, scaling, new_keys, new_values, new_mask)
    return one_token(query.squeeze(2), keys, values, layout, seen, scaling).unsqueeze(2)


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
) -> torch.Tensor:
    batch, num_heads, length, _ = query.shape
    group = num_heads // layout.num_kv_heads
    grouped = query.unflatten(1, (layout.num_kv_heads, group))
    out = torch.empty_like(grouped)
    for cls in layout.classes:
        heads = cls.heads
        filled = min(max(seen), cls.capacity)
        q = grouped[:, heads]
        k = torch.cat([keys.read(cls, filled, query.dtype), new_keys[:, heads]], dim=2)
        v = torch.cat([values.read(cls, filled, query.dtype), new_values[:, heads]], dim=2)
        block = max(1, MASK_ELEMENTS // (batch * group * k.shape[2]))
        for t in range(0, length, block):
            rows = q[:, :, :, t : t + block]
            mask = _extended_mask(cls, layout.window, seen, new_mask, length, t, rows.shape[3], query.device)
            # Query heads of a group and their tokens are rows of one product, so K and V are not repeated.
            attended = scaled_dot_product_attention(
                rows.flatten(2, 3), k, v, attn_mask=mask.repeat(1, 1, group, 1), scale=scaling
            )
            out[:, heads, :, t : t + block] = attended.unflatten(2, (group, -1))
    return out.flatten(1, 2)


def _stored_mask(
    cls: HeadClass, window: int, seen: Sequence[int], length: int, device: torch.device, first: int = 0
) -> torch.Tensor | None:
    """Which filled slots the new tokens `first` .. `first + length - 1` see: bool [B, 1, length, filled], or None if
    they see all."""
    filled = min(max(seen), cls.capacity)
    if min(seen) >= filled and not window:
        return None
    slot = torch.arange(filled, device=device)
    count = torch.tensor(seen, device=device).view(-1, 1, 1, 1)
    mask = (slot < count).expand(-1, 1, length, filled)
    if window:
        # A sliding layer is one ring without sinks, so a slot holds the last token that is its number modulo the ring.
        token = count - 1 - (count - 1 - slot) % cls.capacity
        query = count + torch.arange(first, first + length, device=device).view(1, 1, -1, 1)
        mask = mask & (token > query - window)
    return mask


def _extended_mask(
    cls: HeadClass,
    window: int,
    seen: Sequence[int],
    new_mask: torch.Tensor | None,
    total: int,
    first: int,
    length: int,
    device: torch.device,
) -> torch.Tensor:
    """Which filled slots and new tokens the queries `first` .. see: bool [B, 1, length, filled + total]."""
    if new_mask is None:
        causal = torch.ones(total, total, dtype=torch.bool, device=device).tril()
        new_mask = causal.expand(len(seen), 1, total, total)
    rows = new_mask[:, :, first : first + length]
    stored = _stored_mask(cls, window, seen, length, device, first)
    if stored is None:
        return pad(rows, (min(max(seen), cls.capacity), 0), value=True)
    return torch.cat([stored, rows], dim=-1)
