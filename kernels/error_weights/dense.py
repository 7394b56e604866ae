"""`error_weights` in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.kernels.error_weights.values import Rows, Weights
from kvcompile.kernels.softmax import Softmax


def error_weights(
    asked: Sequence[Rows],
    keys: Tensor,
    values: Tensor,
    metric: Tensor,
    scaling: float,
    window: int,
    softmax: Softmax,
) -> list[Weights]:
    """See `api.error_weights`."""
    v, m = values.float()[:, None], metric.unflatten(0, (len(keys), -1))
    moved = v @ m.mT  # M v_j, [H, G, n, D]
    energy = (moved * v).sum(-1)
    found = []
    for rows in asked:
        p = _probabilities(rows, keys, scaling, window, softmax)
        mixed = p @ v
        # (v - o)'M(v - o) = o'Mo + v'Mv - 2 o'Mv
        apart = torch.einsum("hgti,hgij,hgtj->hgt", mixed, m, mixed)[..., None] + energy[:, :, None]
        apart.flatten(0, 1).baddbmm_(mixed.flatten(0, 1), moved.mT.flatten(0, 1), alpha=-2)
        squared = p.square()
        weight = apart.clamp_min_(0).mul_(squared)  # the difference of equal numbers may come out below 0
        # Token 0 is never quantised. As a sink it often gets most attention, and would drown the others.
        weight[..., 0], squared[..., 0] = 0, 0
        by_query, by_output = weight.sum(-1).flatten(0, 1), squared.sum((2, 3)).flatten()
        found.append(Weights(weight.sum((1, 2)), squared.sum((1, 2)), by_query, by_output))
    return found


def _probabilities(rows: Rows, keys: Tensor, scaling: float, window: int, softmax: Softmax) -> Tensor:
    """Attention to the context's tokens alone, [H, G, T, n]."""
    heads, length, _ = keys.shape
    query = rows.query.float().unflatten(0, (heads, -1)) * scaling  # [H, G, T, D]
    both = torch.cat([keys, rows.own_keys], dim=1).float()
    column, place = torch.arange(both.shape[1], device=keys.device), (rows.places + length)[:, None]
    seen = column <= place
    if window:
        seen = seen & (column > place - window)
    return softmax.weights(query @ both[:, None].mT, seen)[..., :length]
