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
    order = _best_first(score, sink)
    own = torch.tensor([recent], device=order.device), torch.tensor([budget - sink - recent], device=order.device)
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, order, _stays(order, score.shape[1], *own)[:, 0])


def entries(score: Tensor, budgets: NDArray[np.int32], sink: int) -> Tensor:
    """With which of ascending budgets a token comes to be kept, for every share: int32 [H, n, P]; `len(budgets)` where
    it never does. What is kept with one budget is kept with the next."""
    order = _best_first(score, sink)
    kept = torch.full((*score.shape, len(SHARES)), len(budgets), dtype=torch.int32, device=score.device)
    for p, share in enumerate(SHARES):
        recent = np.array([ring(budget, share, sink) for budget in budgets.tolist()])
        own = (torch.tensor(number, device=order.device) for number in (recent, budgets - sink - recent))
        kept[..., p].scatter_(1, order, _stays(order, score.shape[1], *own).sum(1, dtype=torch.int32))
    return len(budgets) - kept


def _best_first(score: Tensor, sink: int) -> Tensor:
    """Tokens after the sinks, int64 [H, n - sink]."""
    return score[:, sink:].sort(dim=1, descending=True, stable=True).indices + sink


def _stays(order: Tensor, length: int, recent: Tensor, older: Tensor) -> Tensor:
    """Which tokens of an `order`, int64 [H, n - sink], of `length` in all, stay with each of C budgets, bool [H, C, n -
    sink]: the `recent` [C] last ones, and the first `older` [C] of the others."""
    others = order[:, None] < (length - recent)[:, None]
    return ~others | (others.cumsum(-1, dtype=torch.int32) <= older[:, None])
