"""The gradient of attention in torch.

With probabilities P[t, j] and the gradient u_t at the output, logits have the gradient

    A[t, j] = P[t, j] (u_t . v_j - sum_i P[t, i] (u_t . v_i)).
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_gradient(
    query: Tensor, upstream: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `query` [num_heads, m, D], `own_keys` and `own_values` [H, m, D] in their dtypes, from `upstream`
    [num_heads, m, D] at the output of attention to `keys` and `values` [H, n, D] and to them."""
    heads, length, _ = keys.shape
    rows, u = (t.float().unflatten(0, (heads, -1)) for t in (query, upstream))  # [H, G, m, D]
    k = torch.cat([keys, own_keys], dim=1).float()[:, None]
    v = torch.cat([values, own_values], dim=1).float()[:, None]
    column, place = torch.arange(k.shape[2], device=k.device), torch.arange(query.shape[1], device=k.device)
    p = (rows @ k.mT * scaling).masked_fill(column > place[:, None] + length, -torch.inf).softmax(-1)
    gain = u @ v.mT
    slope = p * (gain - (p * gain).sum(-1, keepdim=True)) * scaling
    by_query = (slope @ k).flatten(0, 1)
    by_key = (slope[..., length:].mT @ rows).sum(1)
    by_value = (p[..., length:].mT @ u).sum(1)
    return by_query.to(query.dtype), by_key.to(own_keys.dtype), by_value.to(own_values.dtype)
