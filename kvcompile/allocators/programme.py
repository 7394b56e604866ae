"""The linear programme over every choice of every head, by column generation, and its bound on any plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack

from kvcompile.allocators.choices import Choices
from kvcompile.artifacts import TargetError
from kvcompile.stages import WORST

PRICES = 24
"""Prices for a byte at which the first columns are made."""
ROUNDS = 30
"""Most rounds of column generation."""


@dataclass(frozen=True)
class Relaxed:
    """The linear programme's answer: `bound` on the objective of any plan, nats a token; `price` of a byte and
    `weights` [F] of the families in its dual; `columns` (head, choice) [K, 2] and their values [K], of which every
    head's sum to 1."""

    bound: float
    price: float
    weights: NDArray[np.float64]
    columns: NDArray[np.int64]
    values: NDArray[np.float64]


def relax(table: Choices, budget: int) -> Relaxed:
    """Solve the linear programme over all choices within `budget` bytes.

    HiGHS solves it over a few columns a head; its dual prices value every other choice, and each head's best one
    enters, until none is better or the bound is met.

    Raises:
        TargetError: no choice of every head is within the budget.
    """
    num_families, num_heads, _ = table.loss.shape
    columns = _first_columns(table)
    scale = max(float(table.loss.mean()), 1e-30)
    best: Relaxed | None = None
    for _ in range(ROUNDS):
        programme = Programme(table, columns, scale, budget)
        solved = linprog(
            programme.cost, A_ub=programme.below, b_ub=programme.limit, A_eq=programme.one_each,
            b_eq=np.ones(num_heads), method="highs",
        )  # fmt: skip
        if solved.x is None:
            raise TargetError(f"no plan was found within {budget} bytes a sequence: ask for more memory")
        # Marginals of rows "<=" are at most 0: [0] is that of bytes, the others are those of families. Losses were
        # divided by the scale and bytes by the budget; the families' rows have the scale on both sides.
        duals = -solved.ineqlin.marginals
        price = float(duals[0]) * scale / max(budget, 1)
        weights = 1 / num_families + duals[1:]
        # Reduced cost of choice x for head n, but for the dual of the head's own row, which is the same for all x:
        # [N, X] = sum_f weights[f] loss[f, n, x] + price size[x].
        reduced = np.tensordot(weights, table.loss, axes=1) + price * table.size
        entering = reduced.argmin(axis=1)
        # For any price >= 0 and any weights = 1/F + u with u >= 0, sum(u) <= WORST, no plan within the budget has an
        # objective below this (weak duality), as the least is taken over all choices and not over the columns alone.
        bound = float(reduced.min(axis=1).sum() - price * budget)
        if best is None or bound > best.bound:
            best = Relaxed(bound, price, weights, columns, solved.x[:-1])
        new = np.stack([np.arange(num_heads), entering], axis=1)
        grown = np.unique(np.concatenate([columns, new]), axis=0)
        value = float(solved.fun) * scale
        if len(grown) == len(columns) or value - bound <= 1e-6 * max(value, 1e-30):
            return Relaxed(max(bound, best.bound), price, weights, columns, solved.x[:-1])
        columns = grown
    assert best is not None
    return best


def gap(found: float, bound: float) -> float:
    """How far an objective may be from the optimum at most, relative to itself."""
    return max(0.0, found - bound) / max(found, 1e-30)


class Programme:
    """Columns (head, choice) [K, 2] as a linear programme over z [K] and w, in units of `scale` nats and of `budget`
    bytes, all variables at least 0:

        min   mean_f sum_k loss[f, k] z[k] + WORST w
        s.t.  sum_k size[k] z[k] <= 1                        bytes, the first row of `below`
              sum_k loss[f, k] z[k] - w <= 0   for every f   w is the worst family's loss, the other F rows
              sum_{k of head n} z[k] = 1       for every n   one choice a head, `one_each`
    """

    def __init__(self, table: Choices, columns: NDArray[np.int64], scale: float, budget: int) -> None:
        num_families, num_heads, _ = table.loss.shape
        head, choice = columns.T
        loss = table.loss[:, head, choice] / scale
        size = table.size[choice] / max(budget, 1)
        self.cost = np.append(loss.mean(0), WORST)
        worst = csr_array(np.append(0.0, np.full(num_families, -1.0))[:, None])
        self.below = hstack([csr_array(np.vstack([size, loss])), worst], format="csr")
        self.limit = np.append(1.0, np.zeros(num_families))
        owner = csr_array((np.ones(len(head)), (head, np.arange(len(head)))), shape=(num_heads, len(head)))
        self.one_each = hstack([owner, csr_array((num_heads, 1))], format="csr")


def _first_columns(table: Choices) -> NDArray[np.int64]:
    """The best choice of every head at a ladder of prices, for the mean and for each family; the smallest one too."""
    num_heads = len(table.heads)
    # With the smallest choices among the columns the programme always has an answer.
    found = [np.stack([np.arange(num_heads), np.full(num_heads, table.size.argmin())], axis=1)]
    mean = table.loss.mean(0)
    # The largest loss over the fewest bytes: near this price heads take their smallest choice.
    top = float(mean.max()) / max(float(table.size.min()), 1.0)
    ladder = [0.0, *np.geomspace(1e-9, 1.0, PRICES) * max(top, 1e-30)]
    for loss in (mean, *(mean + WORST * family for family in table.loss)):
        for price in ladder:
            best = (loss + price * table.size).argmin(axis=1)
            found.append(np.stack([np.arange(num_heads), best], axis=1))
    return np.unique(np.concatenate(found), axis=0)
