"""The optimum: a multiple-choice knapsack over policy x tokens x key bits x value bits, with a bound on it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.choices import Choices, assigned, choices, policy_of
from kvcompile.allocators.classes import few_classes
from kvcompile.allocators.filling import fill_classes
from kvcompile.allocators.integer import GAP, integral, search
from kvcompile.allocators.predicted import family_losses, objective, predicted_loss
from kvcompile.allocators.programme import gap, relax
from kvcompile.allocators.rows import all_full, least_bytes, limits, plan_bytes
from kvcompile.allocators.topping import top_up
from kvcompile.allocators.uniform import weighted
from kvcompile.stages import Plan, Problem

FILLED = 0.99
"""Share of the target from which on a plan of a few classes is left as it is."""


@dataclass(frozen=True)
class Optimal:
    """Minimise the mean over families plus WORST x the worst family of the summed predicted loss, with one choice a
    head and the sum of bytes at most the target.

    The linear programme over all choices (`programme`) bounds every plan. It mixes choices in a few heads only; the
    best combination of those that fits (`integer.integral`), with the bytes left given to where the curves fall fastest
    (`topping`), is a plan. Where that is further than GAP from the bound, HiGHS searches an integer answer
    (`integer.search`), and the better of the two is taken; without `integer_search`, the first. Under
    `problem.classes`, `classes` chooses instead, and `filling` gives the bytes left to whole classes.
    """

    integer_search: bool = True
    policies: ClassVar[tuple[str, ...]] = ("recent",)

    def __call__(self, problem: Problem) -> Plan:
        table = choices(problem)
        budget = problem.target - _own_bytes(problem)
        relaxed = relax(table, budget)
        searched = filled = False
        if problem.classes is not None:
            few = few_classes(problem, table, relaxed, budget)
            plans = [planned(problem, table, few)]
            if filled := plan_bytes(problem, plans[0]) < FILLED * problem.target:
                plans.append(planned(problem, table, *fill_classes(table, few, budget)))
        else:
            plans = [topped_up(problem, table, integral(table, relaxed, budget), budget)]
            far = gap(objective(family_losses(problem, plans[0])), relaxed.bound) > GAP
            if self.integer_search and far and (integer := search(table, relaxed, budget)) is not None:
                searched = True
                plans.append(topped_up(problem, table, integer, budget))
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
        if filled:
            report["target_used"] = plan_bytes(problem, best) / problem.target
        return dataclasses.replace(best, loss=predicted_loss(problem, best), report=report)


def equal_budgets(problem: Problem) -> list[Plan]:
    """Equal budgets under every policy that has curves: on small and rough problems the programme's few mixed heads
    weigh much, and these can be better."""
    names = sorted({policy_of(problem, share) for share in range(len(problem.profile.shares))})
    own = [replace(problem, policy=name) for name in names]
    ones = np.ones((len(problem.limit), problem.num_kv_heads))
    first = [replace(one, key_bits=one.key_bits[:1], value_bits=one.value_bits[:1]) for one in own]
    return [weighted(one, ones) for one, least in zip(own, first, strict=True) if least_bytes(least) <= one.target]


def topped_up(problem: Problem, table: Choices, choice: NDArray[np.int64], budget: int) -> Plan:
    """The plan of one choice a head [N], with the bytes it leaves given to those whose curves fall fastest."""
    return planned(problem, table, choice, top_up(table, choice, budget))


def planned(
    problem: Problem, table: Choices, choice: NDArray[np.int64], tokens: NDArray[np.int64] | None = None
) -> Plan:
    """The plan of one choice a head [N], with other numbers of `tokens` [N] where they are given."""
    share, own, k, v = table.unravel(choice)
    return assigned(problem, all_full(problem), table.heads, share, own if tokens is None else tokens, k, v)


def _own_bytes(problem: Problem) -> int:
    """Bytes of the layers that keep their own window."""
    slots = int(limits(problem)[problem.fixed].sum())
    return slots * problem.slot_bytes("recent", problem.dtype_bits, problem.dtype_bits)
