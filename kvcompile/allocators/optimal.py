"""The optimum: a multiple-choice knapsack over policy x tokens x key width x value width, with a bound on it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, hstack

from kvcompile.allocators.choices import Choices, assigned, choices, policy_of
from kvcompile.allocators.classes import few_classes
from kvcompile.allocators.predicted import family_losses, objective
from kvcompile.allocators.rows import all_full, least_bytes, limits
from kvcompile.allocators.uniform import weighted
from kvcompile.stages import WORST, Plan, Problem

GAP = 3e-4
"""Relative gap that is good enough."""
NODES = 20
"""Branch-and-bound nodes after which it stops anyway."""
CORE = 5
"""Choices of each head, those of least reduced cost, that the integer search covers."""
MIXED, COMBINATIONS = 12, 4096
"""Most heads with mixed choices, and combinations of these, that are tried one by one."""
PRICES = 24
"""Prices for a byte at which the first columns are made."""
ROUNDS = 30
"""Most rounds of column generation."""


@dataclass(frozen=True)
class Optimal:
    """Minimise the mean over families plus WORST x the worst family of the summed predicted loss, with one choice a
    head and the sum of bytes at most the target.

    The linear programme over all choices is solved by column generation: HiGHS solves it over a few columns a head, its
    dual prices (of a byte, and of each family) value every other choice, and the best of those enter until none is
    better, so that its bound holds for all choices. It mixes choices in a few heads only; the best combination of those
    that fits, with the bytes left given to where the curves fall fastest, is a plan. Where that is further than GAP
    from the bound, HiGHS searches an integer answer among each head's choices of least reduced cost (the core of Balas
    and Zemel, Operations Research 28, 1980), and the better of the two is taken; without `integer_search`, the first.
    """

    integer_search: bool = True
    policies: ClassVar[tuple[str, ...]] = ("recent",)

    def __call__(self, problem: Problem) -> Plan:
        table = choices(problem)
        base = all_full(problem)
        own = _own_bytes(problem)
        budget = problem.target - own
        relaxed = relax(table, budget)
        if problem.classes is not None:
            answers = [few_classes(problem, table, relaxed, budget)]
        else:
            answers = [rounded(table, relaxed, budget)]
        plans = [finished(problem, base, table, answer, budget) for answer in answers]
        searched = False
        wide = gap(objective(family_losses(problem, plans[0])), relaxed.bound) > GAP
        if self.integer_search and problem.classes is None and wide:
            integer = search(table, relaxed, budget)
            if integer is not None:
                searched = True
                plans.append(finished(problem, base, table, integer, budget))
        if problem.classes is None:
            plans += equal_budgets(problem)
        best = min(plans, key=lambda plan: objective(family_losses(problem, plan)))
        families = family_losses(problem, best)
        found = objective(families)
        report: dict[str, Any] = {
            "objective": found,
            "bound": relaxed.bound,
            "gap": gap(found, relaxed.bound),
            "integer_search": searched,
            "heads": len(table.heads),
            "choices": int(table.loss.shape[1] * table.loss.shape[2]),
            "families": dict(zip(problem.profile.families, families.tolist(), strict=True)),
        }
        if problem.classes is not None:
            report["classes_per_layer"] = problem.classes
        return dataclasses.replace(best, loss=float(families.mean()), report=report)


def gap(found: float, bound: float) -> float:
    """How far an objective may be from the optimum at most, relative to itself."""
    return max(0.0, found - bound) / max(found, 1e-30)


def equal_budgets(problem: Problem) -> list[Plan]:
    """Equal budgets under every policy that has curves: on small and rough problems the programme's few mixed heads
    weigh much, and these can be better."""
    names = sorted({policy_of(problem, share) for share in range(len(problem.profile.shares))})
    own = [replace(problem, policy=name) for name in names]
    ones = np.ones((len(problem.limit), problem.num_kv_heads))
    return [weighted(one, ones) for one in own if least_bytes(replace(one, widths=one.widths[:1])) <= one.target]


def _own_bytes(problem: Problem) -> int:
    """Bytes of the layers that keep their own window."""
    slots = int(limits(problem)[problem.fixed].sum())
    return slots * problem.slot_bytes("recent", problem.dtype_bits, problem.dtype_bits)


@dataclass(frozen=True)
class Relaxed:
    """The linear programme's answer: `bound` on the objective of any plan; `price` of a byte and `weights` [F] of the
    families in its dual; `columns` (head, choice) [K, 2] and their values [K]."""

    bound: float
    price: float
    weights: NDArray[np.float64]
    columns: NDArray[np.int64]
    values: NDArray[np.float64]


def relax(table: Choices, budget: int) -> Relaxed:
    """Solve the linear programme over all choices."""
    num_families, num_heads, _ = table.loss.shape
    columns = _first_columns(table)
    scale = max(float(table.loss.mean()), 1e-30)
    best: Relaxed | None = None
    for _ in range(ROUNDS):
        programme = _Programme(table, columns, scale, budget)
        solved = linprog(
            programme.cost, A_ub=programme.below, b_ub=programme.limit, A_eq=programme.one_each,
            b_eq=np.ones(num_heads), method="highs",
        )  # fmt: skip
        duals = -solved.ineqlin.marginals
        price = float(duals[0]) * scale / max(budget, 1)
        weights = 1 / num_families + duals[1:]
        reduced = np.tensordot(weights, table.loss, axes=1) + price * table.size
        entering = reduced.argmin(axis=1)
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


def _first_columns(table: Choices) -> NDArray[np.int64]:
    """The best choice of every head at a ladder of prices, for the mean and for each family; the smallest one too."""
    num_heads = len(table.heads)
    found = [np.stack([np.arange(num_heads), np.full(num_heads, table.size.argmin())], axis=1)]
    mean = table.loss.mean(0)
    top = float(mean.max()) / max(float(table.size.min()), 1.0)
    ladder = [0.0, *np.geomspace(1e-9, 1.0, PRICES) * max(top, 1e-30)]
    for loss in (mean, *(mean + WORST * family for family in table.loss)):
        for price in ladder:
            best = (loss + price * table.size).argmin(axis=1)
            found.append(np.stack([np.arange(num_heads), best], axis=1))
    return np.unique(np.concatenate(found), axis=0)


class _Programme:
    """Columns as a linear programme in units of `scale` and of the budget: minimise the mean over families plus WORST
    times a variable that is no less than any of them; one choice a head, bytes within the budget."""

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


def rounded(table: Choices, relaxed: Relaxed, budget: int) -> NDArray[np.int64]:
    """One choice a head, [N]: what the linear programme chose, and in the few heads where it mixes choices the best
    combination of them that fits, bytes left over counted at their price."""
    used = relaxed.columns[relaxed.values > 1e-9]
    options = [used[used[:, 0] == head, 1] for head in range(len(table.heads))]
    mixed = [head for head, found in enumerate(options) if len(found) > 1][:MIXED]
    best = np.array([found[table.size[found].argmin()] for found in options])
    tried = list(islice(product(*(options[head] for head in mixed)), COMBINATIONS))
    combinations = np.array(tried, np.int64).reshape(len(tried), len(mixed))
    others = np.setdiff1d(np.arange(len(best)), mixed)
    size = table.size[best[others]].sum() + table.size[combinations].sum(axis=1)
    loss = table.loss[:, others, best[others]].sum(axis=1)[:, None] + sum(
        table.loss[:, head, combinations[:, i]] for i, head in enumerate(mixed)
    )
    worth = loss.mean(axis=0) + WORST * loss.max(axis=0) - relaxed.price * (budget - size)
    fits = size <= budget
    if fits.any():
        best[mixed] = combinations[np.where(fits, worth, np.inf).argmin()]
        return best
    # The linear programme's own tolerance: give up what costs least.
    smallest = int(table.size.argmin())
    for head in np.argsort(np.tensordot(relaxed.weights, table.loss, axes=1)[:, smallest]):
        if int(table.size[best].sum()) <= budget:
            break
        best[head] = smallest
    return best


def search(table: Choices, relaxed: Relaxed, budget: int) -> NDArray[np.int64] | None:
    """The integer answer among the core, one choice a head [N]; None where none was found."""
    num_heads = len(table.heads)
    reduced = np.tensordot(relaxed.weights, table.loss, axes=1) + relaxed.price * table.size
    core = np.argpartition(reduced, min(CORE, reduced.shape[1] - 1), axis=1)[:, :CORE]
    mixed = relaxed.columns[relaxed.values > 1e-9]
    columns = np.stack([np.repeat(np.arange(num_heads), core.shape[1]), core.ravel()], axis=1)
    columns = np.unique(np.concatenate([columns, mixed]), axis=0)
    scale = max(relaxed.bound, 1e-30)
    programme = _Programme(table, columns, scale, budget)
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
    if (chosen < 0).any() or int(table.size[chosen].sum()) > budget:
        return None
    return chosen


def finished(problem: Problem, base: Plan, table: Choices, choice: NDArray[np.int64], budget: int) -> Plan:
    """The plan of one choice a head, with the bytes it leaves given to those whose curves fall fastest."""
    share, tokens, k, v = table.unravel(choice)
    if problem.classes is None:
        tokens = top_up(table, choice, budget)
    return assigned(problem, base, table.heads, share, tokens, k, v)


def top_up(table: Choices, choice: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Tokens of every head [N]: those of its choice, and more for the heads whose mean loss falls fastest a byte."""
    share, place, k, v = np.unravel_index(choice, table.shape)
    size = table.size.reshape(table.shape)
    mean = table.loss.mean(0).reshape(-1, *table.shape)
    tokens, left = table.tokens[place].copy(), budget - int(table.size[choice].sum())
    heads = np.arange(len(place))
    while left > 0 and len(table.tokens) > 1:
        after = np.minimum(place + 1, len(table.tokens) - 1)
        more = size[share, after, k, v] - size[share, place, k, v]
        gain = mean[heads, share, place, k, v] - mean[heads, share, after, k, v]
        slot = more // np.maximum(table.tokens[after] - table.tokens[place], 1)
        worth = np.where((more > 0) & (slot <= left), gain / np.maximum(more, 1), -1.0)
        head = int(worth.argmax())
        if worth[head] <= 0:
            break
        step = min(int(table.tokens[after[head]] - table.tokens[place[head]]), int(left // slot[head]))
        tokens[head] += step
        left -= step * int(slot[head])
        if tokens[head] < table.tokens[after[head]]:
            break  # the rest is less than a step of the head it is worth most to
        place[head] = after[head]
    return tokens
