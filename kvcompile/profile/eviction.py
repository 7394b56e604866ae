"""Which tokens of a context a head keeps, for every budget on a curve."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

POINTS = 28
"""Budgets on a curve, before those that fall on the same number of tokens are merged."""

SHARES = (1.0, 0.5, 0.25, 0.0625)
"""Parts of a budget that are a ring of recent tokens: 1 is the policy `recent`, the others are `scored`."""


def budget_grid(window: int, sink: int, points: int = POINTS) -> NDArray[np.int32]:
    """Ascending budgets in tokens, i32 [C], C <= points: geometric from sink + 1 to the window."""
    return np.unique(np.geomspace(sink + 1, window, points).round().astype(np.int32))


def ring(budget: int, share: float, sink: int) -> int:
    """Tokens of a budget that are a ring of recent ones."""
    # The format wants a ring of one token or more: a new token always has a place.
    return min(max(round(share * (budget - sink)), 1), budget - sink)


def survivors(score: Tensor, budget: int, recent: int, sink: int) -> Tensor:
    """Which tokens a head keeps, bool [H, n]: `sink` first ones, `recent` last ones, and of the others the best by
    `score` [H, n], `budget` in all."""
    length = score.shape[1]
    keep = torch.zeros_like(score, dtype=torch.bool)
    if budget >= length:
        return ~keep
    keep[:, :sink] = True
    keep[:, length - recent :] = True
    heavy = budget - sink - recent
    if heavy > 0:
        best = score[:, sink : length - recent].topk(heavy, dim=1).indices
        keep.scatter_(1, best + sink, True)
    return keep


def keep_table(score: Tensor, budgets: NDArray[np.int32], sink: int) -> Tensor:
    """Survivors for every share and budget as 0 and 1, float32 [H, n, P, C]."""
    shares = [
        torch.stack([survivors(score, int(b), ring(int(b), share, sink), sink) for b in budgets], dim=-1)
        for share in SHARES
    ]
    # Floats, because sums over the survivors of all P x C tables are then one matrix product.
    return torch.stack(shares, dim=-2).float()
