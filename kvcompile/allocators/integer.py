"""From the linear programme, which mixes choices in a few heads, to one choice a head."""

from __future__ import annotations

from itertools import islice, product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from kvcompile.allocators.choices import Choices
from kvcompile.allocators.programme import Programme, Relaxed
from kvcompile.stages import WORST

GAP = 3e-4
"""Relative gap that is good enough."""
NODES = 20
"""Branch-and-bound nodes after which it stops anyway."""
CORE = 5
"""Choices of each head, those of least reduced cost, that the integer search covers."""
MIXED, COMBINATIONS = 12, 4096
"""Most heads with mixed choices, and combinations of these, that are tried one by one."""
USED = 1e-9
"""Least value of a column that counts as chosen: smaller ones are the solver's tolerance."""


def integral(table: Choices, relaxed: Relaxed, budget: int) -> NDArray[np.int64]:
    """One choice a head, [N]: what the linear programme chose, and in the few heads where it mixes choices the best
    combination of them that fits, bytes left over counted at their price."""
    used = relaxed.columns[relaxed.values > USED]
    options = [used[used[:, 0] == head, 1] for head in range(len(table.heads))]
    # A vertex of the programme has at most as many variables above 0 as rows that hold with equality: N heads, bytes,
    # and the families that are worst. One of them is w and each head has one, so at most F heads mix choices.
    mixed = [head for head, found in enumerate(options) if len(found) > 1][:MIXED]
    best = np.array([found[table.size[found].argmin()] for found in options])
    tried = list(islice(product(*(options[head] for head in mixed)), COMBINATIONS))
    combinations = np.array(tried, np.int64).reshape(len(tried), len(mixed))
    others = np.setdiff1d(np.arange(len(best)), mixed)
    # Bytes [C] and losses [F, C] of whole plans, one for each of the C combinations.
    size = table.size[best[others]].sum() + table.size[combinations].sum(axis=1)
    loss = table.loss[:, others, best[others]].sum(axis=1)[:, None] + sum(
        table.loss[:, head, combinations[:, i]] for i, head in enumerate(mixed)
    )
    cost = loss.mean(axis=0) + WORST * loss.max(axis=0) - relaxed.price * (budget - size)
    fits = size <= budget
    if fits.any():
        best[mixed] = combinations[np.where(fits, cost, np.inf).argmin()]
        return best
    # The linear programme's own tolerance: give up what costs least.
    smallest = int(table.size.argmin())
    for head in np.argsort(np.tensordot(relaxed.weights, table.loss, axes=1)[:, smallest]):
        if int(table.size[best].sum()) <= budget:
            break
        best[head] = smallest
    return best


def search(table: Choices, relaxed: Relaxed, budget: int) -> NDArray[np.int64] | None:
    """The integer answer among the core, one choice a head [N]; None where none was found.

    The core is each head's choices of least reduced cost (Balas and Zemel, Operations Research 28, 1980), and all that
    the linear programme mixes.
    """
    num_heads = len(table.heads)
    # As in `relax`: [N, X], but for a term that is the same for all choices of a head.
    reduced = np.tensordot(relaxed.weights, table.loss, axes=1) + relaxed.price * table.size
    core = np.argpartition(reduced, min(CORE, reduced.shape[1] - 1), axis=1)[:, :CORE]
    mixed = relaxed.columns[relaxed.values > USED]
    columns = np.stack([np.repeat(np.arange(num_heads), core.shape[1]), core.ravel()], axis=1)
    columns = np.unique(np.concatenate([columns, mixed]), axis=0)
    # In units of the bound the objective is near 1, as HiGHS's tolerances expect.
    scale = max(relaxed.bound, 1e-30)
    programme = Programme(table, columns, scale, budget)
    integrality = np.append(np.ones(len(columns), np.int64), 0)
    # Limited in nodes and not in seconds: the same problem has to give the same plan on any machine.
    answer = milp(
        programme.cost,
        constraints=[
            LinearConstraint(programme.one_each, 1, 1),
            LinearConstraint(programme.below, -np.inf, programme.limit),
        ],
        integrality=integrality,
        bounds=Bounds(0, np.append(np.ones(len(columns)), np.inf)),
        options={"node_limit": NODES, "mip_rel_gap": GAP},
    )
    if answer.x is None:
        return None
    chosen = np.full(num_heads, -1)
    taken = columns[answer.x[:-1] > 0.5]
    chosen[taken[:, 0]] = taken[:, 1]
    # The solver keeps to its rows within a tolerance; we keep to the byte.
    if (chosen < 0).any() or int(table.size[chosen].sum()) > budget:
        return None
    return chosen
