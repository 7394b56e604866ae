"""At most K distinct choices in a layer, for engines that want few shapes."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.choices import Choices
from kvcompile.allocators.programme import Relaxed
from kvcompile.stages import Problem

SUBSETS = 20_000
"""Sets of classes that are all tried; beyond, classes are exchanged one by one while that helps."""
HALVINGS = 40
"""Steps of the bisection for the price of a byte."""
LADDER = 12
"""Prices around the current one at which heads nominate classes."""


def few_classes(problem: Problem, table: Choices, relaxed: Relaxed, budget: int) -> NDArray[np.int64]:
    """One choice a head [N] with at most `problem.classes` distinct ones in a layer, within `budget` bytes.

    At a price for a byte the layers are independent: each takes the K classes, of those that its heads would choose at
    prices nearby, under which its heads do best. The price is found by bisection. Families weigh as in the dual of the
    unconstrained programme.
    """
    assert problem.classes is not None
    loss = np.tensordot(relaxed.weights, table.loss, axes=1)
    layers = [np.flatnonzero(table.heads[:, 0] == layer) for layer in np.unique(table.heads[:, 0])]

    def at(price: float) -> NDArray[np.int64]:
        chosen = np.empty(len(table.heads), np.int64)
        for heads in layers:
            chosen[heads] = _layer(loss[heads], table.size, price, problem.classes or 1)
        return chosen

    low, high = 0.0, max(relaxed.price, 1e-30)
    while int(table.size[at(high)].sum()) > budget and high < 1e30:
        high *= 4
    best = at(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        chosen = at(middle)
        if int(table.size[chosen].sum()) <= budget:
            high, best = middle, chosen
        else:
            low = middle
    return best


def _layer(loss: NDArray[np.float64], size: NDArray[np.int64], price: float, most: int) -> NDArray[np.int64]:
    """The best choice of each head of one layer [h], with at most `most` distinct ones."""
    ladder = price * np.geomspace(0.1, 10.0, LADDER)
    nominated = np.unique(np.concatenate([(loss + p * size).argmin(axis=1) for p in ladder]))
    cost = loss[:, nominated] + price * size[nominated]
    if len(nominated) <= most:
        return np.asarray(nominated[cost.argmin(axis=1)])
    if comb(len(nominated), most) <= SUBSETS:
        subsets = np.array(list(combinations(range(len(nominated)), most)))
        best = subsets[cost[:, subsets].min(axis=2).sum(axis=0).argmin()]
    else:
        best = _exchange(cost, most)
    return np.asarray(nominated[best[cost[:, best].argmin(axis=1)]])


def _exchange(cost: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Columns of `cost` [h, M] whose row minima sum to little: greedy, then swaps while one helps."""
    chosen: list[int] = []
    for _ in range(most):
        kept = cost[:, chosen].min(axis=1, keepdims=True) if chosen else np.full((len(cost), 1), np.inf)
        chosen.append(int(np.minimum(kept, cost).sum(axis=0).argmin()))
    improved = True
    while improved:
        improved = False
        for place in range(most):
            others = [c for i, c in enumerate(chosen) if i != place]
            kept = cost[:, others].min(axis=1, keepdims=True) if others else np.full((len(cost), 1), np.inf)
            totals = np.minimum(kept, cost).sum(axis=0)
            if totals.min() < totals[chosen[place]] - 1e-15:
                chosen[place], improved = int(totals.argmin()), True
    return np.array(chosen)
