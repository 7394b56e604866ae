"""`error_weights` in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.error_weights.values import Weights
from kvcompile.kernels.softmax import Softmax


def error_weights(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    places: Tensor,
    metric: Tensor,
    scaling: float,
    window: int,
    softmax: Softmax,
) -> Weights:
    """See `api.error_weights`."""
    heads, length, _ = keys.shape
    rows = query.float().unflatten(0, (heads, -1)) * scaling  # [H, G, T, D]
    both = torch.cat([keys, own_keys], dim=1).float()
    v, m = values.float()[:, None], metric.unflatten(0, (heads, -1))
    column, place = torch.arange(both.shape[1], device=keys.device), (places + length)[:, None]
    seen = column <= place
    if window:
        seen = seen & (column > place - window)
    p = softmax.weights(rows @ both[:, None].mT, seen)[..., :length]
    mixed = p @ v
    moved = v @ m.mT  # M v_j, [H, G, n, D]
    # (v - o)'M(v - o) = o'Mo + v'Mv - 2 o'Mv
    apart = torch.einsum("hgti,hgij,hgtj->hgt", mixed, m, mixed)[..., None] + (moved * v).sum(-1)[:, :, None]
    apart.flatten(0, 1).baddbmm_(mixed.flatten(0, 1), moved.mT.flatten(0, 1), alpha=-2)
    squared = p.square()
    weight = apart.clamp_min_(0).mul_(squared)  # the difference of equal numbers may come out below 0
    # Token 0 is never quantised. As a sink it often gets most attention, and would drown the others.
    weight[..., 0], squared[..., 0] = 0, 0
    return Weights(weight.sum((1, 2)), squared.sum((1, 2)), weight.sum(-1).flatten(0, 1), squared.sum((2, 3)).flatten())
