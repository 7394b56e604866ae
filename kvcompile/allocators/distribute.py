"""Dividing tokens in proportion to weights, within each head's bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.rows import floors, free_tokens, limits, plan_bytes, rows
from kvcompile.stages import Problem


def distribute(
    weights: NDArray[np.float64], total: int, floor: NDArray[np.int64], cap: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Integers in [floor, cap] of the weights' shape, proportional to `weights` >= 0 where the bounds allow, that sum
    to `total` (to the nearest of sum(floor) and sum(cap) if it lies outside).

    Water-filling: the common factor that makes clip(factor * weight, floor, cap) sum to the total, found by bisection;
    the largest remainders are rounded up.
    """
    total = int(np.clip(total, floor.sum(), cap.sum()))
    # Heads without weight still take what the others cannot hold.
    weights = np.maximum(weights, max(float(weights.max()), 1e-30) * 1e-9)
    low, high = 0.0, float((cap / weights).max())
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(middle * weights, floor, cap).sum() < total:
            low = middle
        else:
            high = middle
    exact = np.clip(high * weights, floor, cap)
    tokens = np.floor(exact).astype(np.int64)
    order = np.argsort(tokens - exact, axis=None, kind="stable")
    while (missing := total - int(tokens.sum())) > 0:
        open_heads = order[tokens.flat[order] < cap.flat[order]]
        tokens.flat[open_heads[:missing]] += 1
    return tokens


def share(problem: Problem, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """The problem's free tokens divided in proportion to `weights` [L, H]; sliding layers keep their window."""
    active, total = ~problem.fixed, free_tokens(problem)
    floor, cap = floors(problem)[active], limits(problem)[active]
    tokens = limits(problem)
    while True:
        tokens[active] = distribute(weights[active], total, floor, cap)
        # A head at its limit is `full`, which can be cheaper than the policy's slots: what that saves is divided too.
        left = (problem.target - plan_bytes(problem, rows(problem, tokens))) // problem.slot_bytes(problem.policy)
        if left <= 0 or total >= cap.sum():
            return tokens
        total += left
