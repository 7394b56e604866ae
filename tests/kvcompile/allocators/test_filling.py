"""What a few classes a layer leave of the target is used, and never for the worse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.allocators import allocate, least_bytes, plan_bytes
from kvcompile.allocators.choices import Choices, choices
from kvcompile.allocators.classes import few_classes
from kvcompile.allocators.filling import fill_classes
from kvcompile.allocators.optimal import planned
from kvcompile.allocators.predicted import family_losses, objective
from kvcompile.allocators.programme import relax
from kvcompile.stages import Plan, Problem

SHAPES = {
    "six families, all bits": {"layers": 6, "heads": 8, "points": 20, "families": 6, "bits": (16, 8, 4)},
    "twelve layers of three": {"layers": 12, "heads": 3, "points": 28, "families": 6, "bits": (16, 8, 4)},
    "exact elements alone": {"layers": 6, "heads": 8, "points": 20},
    "sliding layers": {"layers": 8, "heads": 4, "points": 20, "families": 3, "bits": (32, 8, 4), "sliding": (1, 3)},
}


def distinct(plan: Plan) -> int:
    """The most distinct choices in a layer."""
    tables = (plan.policy, plan.capacity, plan.sink, plan.recent, plan.k_bits, plan.v_bits)
    return max(
        len(set(zip(*(table[layer].tolist() for table in tables), strict=True))) for layer in range(len(plan.policy))
    )


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_target_is_used_and_the_objective_never_worse(make_problem, shape: str, classes: int) -> None:
    improved = 0
    for seed, share in enumerate((0.0625, 0.25, 0.5)):
        problem = make_problem(**SHAPES[shape], context=2048, window=2048, share=share, seed=seed, classes=classes)
        table, budget = choices(problem), own_budget(problem)
        few = few_classes(problem, table, relax(table, budget), budget)
        before, plan = planned(problem, table, few), planned(problem, table, *fill_classes(table, few, budget))
        assert distinct(before) <= classes
        assert distinct(plan) <= classes
        assert 0.99 * problem.target <= plan_bytes(problem, plan) <= problem.target
        without, found = (objective(family_losses(problem, one)) for one in (before, plan))
        assert found <= without
        improved += found < without
    assert improved > 0


def own_budget(problem: Problem) -> int:
    """Bytes of the target beside those of layers that keep their own window."""
    slots = int(problem.limit[problem.fixed].sum()) * problem.num_kv_heads
    return problem.target - slots * problem.slot_bytes("recent", problem.dtype_bits, problem.dtype_bits)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_report_says_what_is_used(make_problem, shape: str) -> None:
    reported = 0
    for classes in (1, 2, 4):
        problem = make_problem(**SHAPES[shape], context=2048, window=2048, share=0.125, seed=5, classes=classes)
        plan = allocate("optimal", problem)
        used = plan_bytes(problem, plan) / problem.target
        assert plan.report.get("target_used", used) == used >= 0.99
        assert plan.report["objective"] == objective(family_losses(problem, plan))
        assert distinct(plan) <= classes
        reported += "target_used" in plan.report
    assert reported > 0, "no plan had to be filled, so the test shows nothing"
    assert "target_used" not in allocate("optimal", make_problem(layers=2, classes=None)).report


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0.02, 0.95), seed=st.integers(0, 10_000), families=st.integers(1, 3))
def test_classes_stay_together_within_the_budget(make_problem, share: float, seed: int, families: int) -> None:
    """From any choices, not only from good ones."""
    problem = make_problem(layers=3, heads=4, points=8, share=share, seed=seed, families=families, bits=(16, 4))
    if problem.target < least_bytes(problem):
        return
    table = choices(problem)
    rng = np.random.default_rng(seed)
    affordable = np.flatnonzero(table.size <= problem.target // len(table.heads))
    before = rng.choice(affordable, 2)[rng.integers(0, 2, len(table.heads))]
    after, tokens = fill_classes(table, before, problem.target)
    shapes = np.stack([after, tokens])
    for layer in range(3):
        heads = np.flatnonzero(table.heads[:, 0] == layer)
        for choice in np.unique(before[heads]):
            assert len(np.unique(shapes[:, heads[before[heads] == choice]], axis=1).T) == 1
    assert plan_bytes(problem, planned(problem, table, after, tokens)) <= problem.target
    assert summed(table, after) <= summed(table, before)
    assert (tokens >= table.unravel(after)[1]).all()


def summed(table: Choices, choice: np.ndarray) -> float:
    return objective(table.loss[:, np.arange(len(choice)), choice].sum(1))


def test_the_last_bytes_go_where_they_help_most() -> None:
    """Two layers of two heads, one class each: losses fall linearly, in the second layer twice as fast."""
    tokens = np.array([10, 100])
    loss = np.array([[1.0, 0.5], [1.0, 0.5], [2.0, 1.0], [2.0, 1.0]])[None]
    heads = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    table = Choices(heads, tokens, (1, 2, 1, 1), tokens * 256, loss)
    choice = np.zeros(4, np.int64)
    for spare, expected in ((2 * 90 * 256, [10, 10, 100, 100]), (7 * 512 + 300, [10, 10, 17, 17]), (511, [10] * 4)):
        _, filled = fill_classes(table, choice, 40 * 256 + spare)
        assert filled.tolist() == expected
    everything, filled = fill_classes(table, choice, 10**6)
    assert filled.tolist() == [100] * 4
    assert everything.tolist() == [1] * 4
