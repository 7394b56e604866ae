"""Exact attention of prompts, or of chunks of them: the checked entry point."""

from __future__ import annotations

import torch

from kvcompile.kernels.native import prompt
from kvcompile.kernels.prompt_attention import dense
from kvcompile.kernels.softmax import PLAIN, Softmax


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
    """Attention of the last T of n columns: causal, within a sliding window, and without padding.

    Args:
        query: [B, num_heads, T, D], query heads of one KV head side by side.
        keys, values: [B, num_kv_heads, n, D], rotary embedding applied.
        pad: int64 [B], the columns of sequence b before this one are padding (None: no padding).
        window: columns that a query sees, its own included; 0 for all of them.
        scaling: factor on the logits.
        kept: bool [num_kv_heads, n - T], which of the columns before the queries' own a KV head still has (None: all).
        softmax: how logits become weights.

    Returns:
        [B, num_heads, T, D] in the query's dtype. What padding itself sees is left open, but finite.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    batch, num_heads, length, head_dim = query.shape
    heads, columns = keys.shape[1:3]
    if keys.shape != values.shape or keys.shape != (batch, heads, columns, head_dim):
        found = (tuple(keys.shape), tuple(values.shape))
        raise ValueError(f"keys and values {found} for a query {tuple(query.shape)}")
    if num_heads % heads or columns < length:
        raise ValueError(
            f"{num_heads} query heads of {length} tokens for {heads} KV heads of {columns}: expected a multiple of the "
            "heads, and no more tokens"
        )
    if kept is not None and (kept.shape != (heads, columns - length) or kept.dtype != torch.bool):
        raise ValueError(f"kept {kept.dtype} {tuple(kept.shape)}, expected bool {(heads, columns - length)}")
    if softmax.cap is None and prompt.usable(query, keys, values, scaling):
        return prompt.prompt_attention(query, keys, values, pad, window, scaling, kept, softmax.sinks)
    return dense.prompt_attention(query, keys, values, pad, window, scaling, kept, softmax)
