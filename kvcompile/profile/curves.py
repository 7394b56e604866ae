"""From attention and gradients to loss curves: tensors in, tensors out, nothing about models.

Let a query at position t attend with probabilities P[t, j], and let u_t be the gradient of the log-likelihood of the
whole window with respect to that head's attention output at t: W_O^T times the gradient at the residual stream. Entry
(t, j) contributes S[t, j] = P[t, j] (u_t . v_j) to the first-order effect of the output, and keeping only a set K of
tokens, with the softmax renormalised over it, changes the log-likelihood by

    err[t] = sum_K S[t] / sum_K P[t] - sum S[t],         summed over the query heads that share the KV head.

With labels sampled from the model itself, E[err^2] is the quadratic form of that change in the true Fisher matrix,
which is the Hessian of the KL divergence. Taken block-diagonal over heads and over t, the predicted KL is

    loss = 1/2 mean_t err[t]^2        nats a token.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 128
"""Queries handled at once wherever attention probabilities or masks are materialised."""

POINTS = 40
"""Budgets on a curve, before those that fall on the same number of tokens are merged."""


def budget_grid(window: int, sink: int, points: int = POINTS) -> NDArray[np.int32]:
    """Ascending budgets in tokens, i32 [C], C <= points: geometric from sink + 1 to the window."""
    return np.unique(np.geomspace(sink + 1, window, points).round().astype(np.int32))


def sampled_positions(window: int, count: int) -> Tensor:
    """`count` positions (fewer in a short window), i64 ascending, evenly strided over the window's last half."""
    first = window // 2
    return torch.from_numpy(np.linspace(first, window - 1, min(count, window - first)).round().astype(np.int64))


def recent_losses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    *,
    scaling: float,
    positions: Tensor,
    budgets: Tensor,
    sink: int,
) -> Tensor:
    """Predicted loss of the `recent` policy at every budget, float64 [H, C], nats a token.

    `query` and `gradient` (u above) are [Hq, n, D], `key` and `value` [H, n, D], of any float type; the arithmetic is
    float32. `positions` i64 [T] ascending are the queries averaged over. `budgets` i64 [C] ascending, all above `sink`:
    the query at t keeps the tokens before `sink` and its last `budget - sink`, itself included, and loses
    nothing where t < budget.
    """
    num_kv_heads, length, head_dim = key.shape
    # Newest token first, so that a running sum over keys is the mass of the most recent ones, with no cancellation.
    key, value = key.float().flip(1), value.float().flip(1)
    total = torch.zeros(num_kv_heads, len(budgets), dtype=torch.float64, device=key.device)
    for rows in torch.split(positions, BLOCK):
        newest = int(rows[-1]) + 1
        seen = slice(length - newest, None)
        grouped = (num_kv_heads, -1, len(rows), head_dim)
        total += _block(
            query[:, rows].float().view(grouped) * scaling,
            key[:, seen],
            value[:, seen],
            gradient[:, rows].float().view(grouped),
            rows,
            budgets,
            sink,
        )
    return total / (2 * len(positions))


def _block(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, rows: Tensor, budgets: Tensor, sink: int
) -> Tensor:
    """sum_t err[t]^2, float64 [H, C], of one block; `query`, `gradient` [H, G, B, D], newest of the m keys first."""
    shape = (*query.shape[:3], key.shape[1])
    age = key.shape[1] - 1 - rows  # place of each query's own token among the keys
    future = torch.arange(key.shape[1], device=key.device) < age[:, None]
    mass = (query.flatten(1, 2) @ key.mT).view(shape).masked_fill_(future, -torch.inf).softmax(-1)
    effect = (gradient.flatten(1, 2) @ value.mT).view(shape).mul_(mass)

    last = (age[:, None] + budgets - sink - 1).clamp(max=key.shape[1] - 1)
    last = last.expand(*shape[:2], *last.shape)
    sinks = slice(key.shape[1] - sink, None)
    sink_mass, sink_effect = mass[..., sinks].sum(-1, keepdim=True), effect[..., sinks].sum(-1, keepdim=True)
    mass, effect = mass.cumsum_(-1), effect.cumsum_(-1)
    kept_mass = sink_mass + mass.gather(-1, last)
    kept_effect = sink_effect + effect.gather(-1, last)
    error = kept_effect / kept_mass.clamp_min(torch.finfo(torch.float32).tiny) - effect[..., -1:]
    error = error.sum(1).masked_fill(rows[:, None] < budgets, 0.0)
    return error.double().square().sum(1)
