"""`prompt_attention` in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvcompile.artifacts import MASK_ELEMENTS
from kvcompile.kernels.softmax import PLAIN, Softmax, attended

FLASH_HEAD_DIM = 256
"""Largest heads of torch's flash attention."""


def prompt_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pad: torch.Tensor | None,
    window: int,
    scaling: float,
    kept: torch.Tensor | None = None,
    softmax: Softmax = PLAIN,
) -> torch.Tensor:
    """See `api.prompt_attention`."""
    length, count = query.shape[2], keys.shape[2]
    if softmax.plain and pad is None and kept is None and not 0 < window < count:
        grouped = query.shape[1] != keys.shape[1]
        if length == count and (query.device.type == "cpu" or _flash(query)):
            return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped)
        if _flash(query):
            mask = causal_lower_right(length, count)
            return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return _in_blocks(query, keys, values, pad, window, scaling, kept, softmax)


def _flash(query: torch.Tensor) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and query.shape[3] <= FLASH_HEAD_DIM


def _in_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pad: torch.Tensor | None,
    window: int,
    scaling: float,
    kept: torch.Tensor | None,
    softmax: Softmax,
) -> torch.Tensor:
    """With masks: query heads of a group and their tokens are rows of one product, so K and V are not repeated."""
    batch, _, length, _ = query.shape
    heads, count = keys.shape[1], keys.shape[2]
    grouped = query.unflatten(1, (heads, -1))
    group = grouped.shape[2]
    widest = min(count, window + length) if window else count
    masks = (1 if pad is None else batch) * (1 if kept is None else heads)
    block = max(1, MASK_ELEMENTS // (group * widest * masks))
    out = torch.empty_like(grouped)
    for t in range(0, length, block):
        rows = grouped[:, :, :, t : t + block]
        start = count - length + t
        stop = start + rows.shape[3]
        first = max(0, start - window + 1) if window else 0
        column = torch.arange(first, stop, device=query.device)
        row = torch.arange(start, stop, device=query.device)[:, None]
        mask = (column <= row)[None]
        if window:
            mask = mask & (column > row - window)
        if pad is not None:  # a token sees itself, padding too: a row without any would be no number
            mask = mask & ((column >= pad[:, None, None]) | (column == row))
        mask = mask[:, None]
        if kept is not None:  # the queries' own columns all are
            mask = mask & F.pad(kept, (0, length), value=True)[:, None, first:stop]
        k, v = keys[:, :, first:stop], values[:, :, first:stop]
        if not softmax.plain:
            found = attended(rows.flatten(1, 2), k, v, mask[:, :, None], scaling, softmax).unflatten(1, (heads, -1))
        else:
            repeated = mask.repeat(1, 1, group, 1)
            found = scaled_dot_product_attention(rows.flatten(2, 3), k, v, attn_mask=repeated, scale=scaling)
            found = found.unflatten(2, (group, -1))
        out[:, :, :, t : t + block] = found
    return out.flatten(1, 2)
