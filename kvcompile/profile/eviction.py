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
    `score` [H, n], the earlier of two that tie; `budget` in all."""
    return _survivors(_best_first(score, sink), budget, recent, sink)


def entries(score: Tensor, budgets: NDArray[np.int32], sink: int) -> Tensor:
    """With which of ascending budgets a token comes to be kept, for every share: int32 [H, n, P]; `len(budgets)` where
    it never does. What is kept with one budget is kept with the next."""
    order, length = _best_first(score, sink), score.shape[1]
    kept = torch.full((*score.shape, len(SHARES)), len(budgets), dtype=torch.int32, device=score.device)
    for p, share in enumerate(SHARES):
        recent = np.array([ring(budget, share, sink) for budget in budgets.tolist()])
        start, most = (
            torch.tensor(t, device=order.device)[:, None] for t in (length - recent, budgets - sink - recent)
        )
        older = order[:, None] < start
        # All budgets at once, [H, C, n - sink]: recent ones, and of the older ones the first that there is room for.
        stays = ~older | (older.cumsum(-1, dtype=torch.int32) <= most)
        kept[..., p].scatter_(1, order, stays.sum(1, dtype=torch.int32))
    return len(budgets) - kept


def _best_first(score: Tensor, sink: int) -> Tensor:
    """Tokens after the sinks, int64 [H, n - sink]."""
    return score[:, sink:].sort(dim=1, descending=True, stable=True).indices + sink


def _survivors(order: Tensor, budget: int, recent: int, sink: int) -> Tensor:
    length = order.shape[1] + sink
    keep = torch.zeros(len(order), length, dtype=torch.bool, device=order.device)
    if budget >= length:
        return ~keep
    keep[:, :sink] = True
    keep[:, length - recent :] = True
    heavy = order < length - recent
    # As many of those that are not recent as are left of the budget, best first.
    keep.scatter_(1, order, keep.gather(1, order) | heavy & (heavy.cumsum(1) <= budget - sink - recent))
    return keep
