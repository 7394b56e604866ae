"""The optimum: against brute force, against its bound, and against the clock."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.allocators import allocate, optimal, plan_bytes
from kvcompile.allocators.curves import loss_at
from kvcompile.allocators.optimal import hull
from kvcompile.problem import DEFAULT_SINK


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.05, 0.9), seed=st.integers(0, 10_000))
def test_no_combination_of_measured_points_is_better(make_problem, share: float, seed: int) -> None:
    problem = make_problem(layers=2, heads=2, points=6, share=share, seed=seed)
    if problem.target < 4 * (DEFAULT_SINK + 1) * 256:
        return
    plan = allocate("optimal", problem)
    points = [problem.profile.tokens.tolist()] * 4
    curves = problem.profile.recent_loss.reshape(4, -1)
    feasible = (c for c in itertools.product(range(len(points[0])), repeat=4))
    best = min(
        sum(curves[i, k] for i, k in enumerate(c))
        for c in feasible
        if sum(points[i][k] for i, k in enumerate(c)) * 256 <= problem.target
    )
    assert plan.report["bound"] <= best * (1 + 1e-6) + 1e-12
    # Rounding the LP's answer down costs at most one step of one hull.
    steps = [-np.diff(hull(problem, layer, head)[:, 1]) for layer, head in np.ndindex(2, 2)]
    assert plan.loss <= best + max(step.max(initial=0.0) for step in steps) + 1e-9


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(("layers", "heads", "seconds"), [(28, 4, 1.0), (80, 8, 5.0)])
def test_large_models_solve_quickly_with_a_small_gap(make_problem, layers, heads, seconds, share) -> None:
    problem = make_problem(layers, heads, 40, share=share, context=4096, window=4096)
    start = time.perf_counter()
    plan = allocate("optimal", problem)
    elapsed = time.perf_counter() - start
    assert elapsed < seconds
    assert plan.report["gap"] < 1e-3
    assert plan.report["bound"] <= plan.report["objective"] * (1 + 1e-4)
    assert 0.99 * problem.target <= plan_bytes(problem, plan) <= problem.target


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.02, 0.95), seed=st.integers(0, 10_000))
def test_the_target_is_used_while_a_head_can_gain(make_problem, share: float, seed: int) -> None:
    problem = make_problem(layers=6, heads=3, points=20, context=2048, window=2048, share=share, seed=seed)
    plan = allocate("optimal", problem)
    assert plan_bytes(problem, plan) >= 0.99 * problem.target


def test_hulls_are_convex_and_below_the_curve(make_problem) -> None:
    problem = make_problem(points=40, context=4096, window=4096)
    for layer, head in np.ndindex(4, 2):
        points = hull(problem, layer, head)
        slopes = np.diff(points[:, 1]) / np.diff(points[:, 0])
        assert (slopes < 0).all()
        assert (np.diff(slopes) >= -1e-15).all()
        tokens = problem.profile.tokens.astype(np.int64)
        under = np.interp(tokens, points[:, 0], points[:, 1])
        assert (under <= loss_at(problem, layer, head, tokens) + 1e-12).all()
        assert points[0, 0] == DEFAULT_SINK + 1
        assert points[-1].tolist() == [4096, 0]


def test_a_longer_context_stretches_the_curves(make_problem) -> None:
    short = allocate("optimal", make_problem(context=512, window=512, points=30))
    long = allocate("optimal", make_problem(context=4096, window=512, points=30))
    ratio = long.capacity / np.maximum(short.capacity, 1)
    assert abs(np.median(ratio) - 8) < 0.5


def test_without_an_integer_answer_the_lp_stands_in(make_problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimal, "milp", lambda *a, **k: SimpleNamespace(x=None, status=1))
    problem = make_problem(28, 4, 40, context=4096, window=4096)
    plan = allocate("optimal", problem)
    assert not plan.report["integer_solved"]
    assert plan.report["gap"] < 1e-2
    assert 0.99 * problem.target <= plan_bytes(problem, plan) <= problem.target
