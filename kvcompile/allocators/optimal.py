"""The optimum: a multiple-choice knapsack over {full, recent x tokens}, with the bound that certifies it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from kvcompile.allocators.curves import grid, loss_at, predicted_loss
from kvcompile.allocators.rows import floors, free_tokens, limits, rows
from kvcompile.problem import Plan, Problem

GAP = 3e-4
"""Relative gap at which the integer search may stop."""
NODES = 200
"""Branch-and-bound nodes after which it stops anyway."""
NEIGHBOURS = 2
"""Vertices on either side of the LP's answer that the integer search covers."""


@dataclass(frozen=True)
class Optimal:
    """Minimise the sum of predicted losses w[i,c] x[i,c] over heads i and choices c, with one choice a head and
    sum m[i,c] x[i,c] <= target.

    Every head's choices are the vertices of the lower convex hull of its measured curve: dropping the others changes
    nothing for the LP, whose answer mixes at most one head, and all but nothing for the integer answer. The LP gives
    the bound and HiGHS the integer answer; the tokens that either leaves go to where the curves fall fastest, and the
    better of the two is the plan.
    """

    policies: ClassVar[tuple[str, ...]] = ("recent",)

    def __call__(self, problem: Problem) -> Plan:
        tokens = limits(problem)
        heads = np.argwhere(np.broadcast_to(~problem.fixed[:, None], tokens.shape))
        hulls = [hull(problem, int(i), int(h)) for i, h in heads]
        total = free_tokens(problem)
        bound, rounded, integer = solve(hulls, total)
        answers = [rounded] if integer is None else [integer, rounded]
        plans = []
        for chosen in answers:
            tokens[heads[:, 0], heads[:, 1]] = top_up(problem, heads, hulls, chosen, total)
            plan = rows(problem, tokens)
            plans.append(dataclasses.replace(plan, loss=predicted_loss(problem, plan)))
        best = min(plans, key=lambda plan: plan.loss)
        loss = best.loss
        report = {
            "objective": loss,
            "bound": bound,
            "gap": max(0.0, loss - bound) / max(loss, 1e-30),
            "integer_solved": integer is not None,
            "heads": len(heads),
            "choices": sum(map(len, hulls)),
        }
        return dataclasses.replace(best, report=report)


def hull(problem: Problem, layer: int, head: int) -> NDArray[np.float64]:
    """Vertices [n, 2] of the lower convex hull of a head's curve, as (tokens, loss): tokens rise, losses fall."""
    limit, floor = int(problem.limit[layer]), int(floors(problem)[layer, head])
    # Whole tokens on both sides of every measured point: between them the curve is straight, so that no budget lies
    # below the hull and the bound holds for all.
    around = np.concatenate([np.floor(grid(problem)), np.ceil(grid(problem)), [floor, limit]])
    tokens = np.unique(np.clip(around, floor, limit).astype(np.int64))
    vertices: list[tuple[float, float]] = []
    for t, w in zip(tokens.tolist(), loss_at(problem, layer, head, tokens).tolist(), strict=True):
        if vertices and w >= vertices[-1][1]:
            continue  # dominated: more tokens for no less loss
        while len(vertices) > 1 and _above(vertices[-2], vertices[-1], (t, w)):
            vertices.pop()
        vertices.append((t, w))
    return np.array(vertices)


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def solve(hulls: list[NDArray[np.float64]], total: int) -> tuple[float, NDArray[np.int64], NDArray[np.int64] | None]:
    """The LP's bound on the summed loss within `total` tokens; its answer, one vertex a head, rounded down; and the
    integer answer of HiGHS, or None where it found none."""
    # HiGHS works to absolute tolerances and losses span decades, so one unit is a head's mean loss at equal budgets.
    equal = total / len(hulls)
    scale = max(float(np.mean([np.interp(equal, points[:, 0], points[:, 1]) for points in hulls])), 1e-30)
    table = _Table(hulls, scale, total)
    relaxed = linprog(
        table.loss, A_ub=table.tokens, b_ub=[1.0], A_eq=table.one_each, b_eq=np.ones(len(hulls)), method="highs"
    )
    bound = float(relaxed.fun) * scale
    # The LP mixes two neighbouring vertices of at most one head; the smaller of them fits.
    rounded = table.chosen(relaxed.x > 1e-9)

    # The integer optimum lies close to the LP's, so a few vertices around it are enough to search (the core of Balas
    # and Zemel, Operations Research 28, 1980); the bound covers them all.
    first = np.maximum(rounded - NEIGHBOURS, 0)
    core = [points[f : f + 2 * NEIGHBOURS + 2] for points, f in zip(hulls, first.tolist(), strict=True)]
    table = _Table(core, scale, total)
    # Limited in nodes and not in seconds: the same problem has to give the same plan on any machine.
    integer = milp(
        table.loss,
        constraints=[LinearConstraint(table.one_each, 1, 1), LinearConstraint(table.tokens, -np.inf, 1.0)],
        integrality=np.ones(len(table.loss), np.int64),
        bounds=Bounds(0, 1),
        options={"node_limit": NODES, "mip_rel_gap": GAP},
    )
    if integer.x is None:
        return bound, rounded, None
    chosen = first + table.chosen(integer.x > 0.5)
    fits = sum(points[c, 0] for points, c in zip(hulls, chosen, strict=True)) <= total
    return bound, rounded, chosen if fits else None


class _Table:
    """Every choice of every head as one column: scaled loss, share of the tokens, and which head it belongs to."""

    def __init__(self, hulls: list[NDArray[np.float64]], scale: float, total: int) -> None:
        self.sizes = [len(points) for points in hulls]
        flat = np.concatenate(hulls)
        owner = np.repeat(np.arange(len(hulls)), self.sizes)
        self.loss = flat[:, 1] / scale
        self.tokens = csr_array(flat[None, :, 0] / max(total, 1))
        self.one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(hulls), len(flat)))

    def chosen(self, taken: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The first choice of each head that is taken."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        return np.array([taken[s : s + n].argmax() for s, n in zip(starts, self.sizes, strict=True)])


def top_up(
    problem: Problem,
    heads: NDArray[np.int64],
    hulls: list[NDArray[np.float64]],
    chosen: NDArray[np.int64],
    total: int,
) -> NDArray[np.int64]:
    """Tokens of every head: its chosen vertex, and of what is left of `total`, more for the heads whose hulls fall
    fastest beyond their choice, where the measured curve falls too."""
    budget = np.array([points[c, 0] for points, c in zip(hulls, chosen, strict=True)], np.int64)
    left = total - int(budget.sum())
    steps = []
    for n, (points, c) in enumerate(zip(hulls, chosen, strict=True)):
        for k in range(c, len(points) - 1):
            slope = (points[k, 1] - points[k + 1, 1]) / (points[k + 1, 0] - points[k, 0])
            steps.append((-slope, n, int(points[k, 0]), int(points[k + 1, 0])))
    for _, n, start, end in sorted(steps):
        if left == 0:
            break
        if budget[n] != start:
            continue
        more = min(left, end - start)
        layer, head = heads[n].tolist()
        now, then = loss_at(problem, layer, head, np.array([start, start + more]))
        if then < now:
            budget[n] += more
            left -= more
    return budget
