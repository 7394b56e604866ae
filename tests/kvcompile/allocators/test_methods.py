"""Each published allocator against its formula, and all of them against the target."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.allocators import ALLOCATORS, allocate, default_policy, least_bytes, plan_bytes
from kvcompile.allocators.rows import all_full
from kvcompile.allocators.squeeze import most_similar
from kvcompile.artifacts import POLICIES, TargetError

PAIRS = [(name, policy) for name, allocator in ALLOCATORS.items() for policy in allocator.policies]


@pytest.mark.parametrize(("name", "policy"), PAIRS)
@settings(max_examples=25, deadline=None)
@given(
    share=st.floats(0.005, 1.2), sliding=st.sets(st.integers(0, 3), max_size=3), context=st.integers(16, 900),
    sink=st.sampled_from([0, 4]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_plan_keeps_to_the_target_and_the_bounds(
    make_problem, name, policy, share, sliding, context, sink, seed
) -> None:
    problem = make_problem(share=share, context=context, policy=policy, sliding=tuple(sliding), sink=sink, seed=seed)
    if problem.target < least_bytes(problem):
        with pytest.raises(TargetError, match=str(least_bytes(problem))):
            allocate(name, problem)
        return
    plan = allocate(name, problem)
    limit = problem.limit[:, None]
    assert plan_bytes(problem, plan) <= problem.target
    assert (plan.recent >= 1).all()
    assert (plan.sink + plan.recent <= plan.capacity).all()
    assert (plan.capacity <= limit).all()
    codes = np.array(POLICIES)[plan.policy]
    assert ((codes == "full") <= (plan.capacity == limit)).all()
    stateless = np.isin(codes, ["full", "recent"])
    assert (plan.sink + plan.recent == plan.capacity)[stateless].all()
    fixed = problem.fixed
    assert (codes[fixed] == "recent").all()
    assert (plan.capacity[fixed] == problem.limit[fixed][:, None]).all()
    assert not plan.sink[fixed].any()


@pytest.mark.parametrize(("name", "policy"), PAIRS)
def test_a_full_target_is_the_full_cache(make_problem, name, policy) -> None:
    plan = allocate(name, make_problem(share=1.0, policy=policy))
    assert (plan.policy == POLICIES.index("full")).all()
    assert plan.loss == 0


def test_unknown_names_are_refused(make_problem) -> None:
    with pytest.raises(TargetError, match="no allocator 'best'"):
        allocate("best", make_problem())
    with pytest.raises(TargetError, match="'h2o'"):
        allocate("optimal", make_problem(policy="h2o"))


def test_uniform_is_equal_to_one_token(make_problem) -> None:
    tokens = allocate("uniform", make_problem(share=0.31)).capacity
    assert tokens.max() - tokens.min() <= 1
    assert tokens.sum() == int(0.31 * 512 * 8)


def test_pyramid_falls_linearly_by_beta(make_problem) -> None:
    tokens = allocate("pyramid", make_problem(layers=5, context=2048, window=2048, policy="recent")).capacity[:, 0]
    mean, window = 512, 32
    last = (mean - window) / 20
    want = np.linspace(2 * (mean - window) - last, last, 5) + window
    assert np.abs(tokens - want).max() <= 1


def test_squeeze_takes_from_the_most_similar_layers(make_problem) -> None:
    problem = make_problem(layers=6)
    cosine = np.array([0.5, 0.95, 0.96, 0.7, 0.52, 0.71], np.float32)
    problem = dataclasses.replace(problem, profile=dataclasses.replace(problem.profile, squeeze=cosine))
    plan = allocate("squeeze", problem)
    assert plan.report["unimportant_layers"] == [1, 2]
    tokens = plan.capacity[:, 0]
    assert np.abs(tokens - np.where(np.isin(range(6), [1, 2]), 0.35, (6 - 0.7) / 4) * 128).max() <= 1


def test_layers_that_cannot_be_told_apart_are_left_alone() -> None:
    assert not most_similar(np.full(7, 0.8)).any()
    assert not most_similar(np.array([0.8])).any()


def test_baklava_takes_the_parameters_of_least_perplexity(make_problem) -> None:
    asked = []

    def perplexity(capacity: np.ndarray) -> float:
        asked.append(capacity)
        return 10.0 - float(capacity.max() / capacity.mean())  # the more unequal, the better

    problem = make_problem(perplexity=perplexity, layers=8)
    plan = allocate("baklava", problem)
    assert (plan.report["tau"], plan.report["p"]) == (0.75, 0.3)
    assert len(asked) == 10
    important = problem.profile.baklava >= np.quantile(problem.profile.baklava, 0.75)
    assert plan.capacity[important].min() > 2 * plan.capacity[~important].max()
    assert abs(int(plan.capacity[~important].max()) - 0.3 * 128) <= 1
    without = allocate("baklava", dataclasses.replace(problem, perplexity=None))
    assert (without.report["tau"], without.report["p"]) == (0.5, 0.5)


def test_surfacelogic_shares_the_dynamic_part_by_score(make_problem) -> None:
    problem = make_problem(share=0.1)
    score = np.zeros((4, 2), np.float32)
    score[1, 0], score[2, 1] = 1.0, 0.5
    problem = dataclasses.replace(problem, profile=dataclasses.replace(problem.profile, surfacelogic=score))
    tokens = allocate("surfacelogic", dataclasses.replace(problem, policy="snapkv")).capacity
    total, base = int(0.1 * 512 * 8), (1 - 1 / 1.351) / 8
    raw = score + 0.01 * score / np.maximum(score.sum(1, keepdims=True), 1e-12)
    want = total * (base + raw / raw.sum() / 1.351)
    assert np.abs(tokens - want).max() <= 1


def test_duo_keeps_the_most_damaged_heads_full(make_problem) -> None:
    problem = make_problem(layers=8, context=4096, window=4096)
    plan = allocate("duo", problem)
    full = plan.policy == POLICIES.index("full")
    curve, tokens = problem.profile.loss[0, :, :, 0], problem.profile.tokens
    damage = np.array([[np.interp(384, tokens, curve[i, h]) for h in range(2)] for i in range(8)])
    assert full.sum() == plan.report["full_heads"] == (1024 * 16 - 384 * 16) // (4096 - 384)
    assert damage[full].min() >= damage[~full].max()
    assert (plan.sink[~full] == 128).all()
    assert (plan.recent[~full] == 256).all()
    tight = allocate("duo", make_problem(layers=8, context=4096, window=4096, share=0.03))
    assert (tight.capacity == int(0.03 * 4096)).all()
    assert (tight.recent // tight.sink == 2).all()


@pytest.mark.parametrize("context", [2, 40, 2048])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.05, 0.3, 0.9])
def test_duo_counts_its_own_sinks_where_the_problem_has_none(make_problem, context, share) -> None:
    """Sinks bring exact copies of token 0 with quantised keys and values; without room for them there are no sinks."""
    problem = make_problem(layers=5, heads=3, context=context, window=2048, sink=0, bits=(8,))
    least, full = least_bytes(problem), plan_bytes(problem, all_full(problem))
    problem = dataclasses.replace(problem, target=least + int(share * (full - least)))
    plan = allocate("duo", problem)
    assert plan_bytes(problem, plan) <= problem.target
    assert plan.sink.any() == (share * context > 4)


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if "recent" in ALLOCATORS[name].policies])
@pytest.mark.parametrize("bits", [(16,), (8,), (16, 8, 4)])
def test_a_context_of_one_token_has_a_plan(make_problem, name, bits) -> None:
    bits = bits if name == "optimal" else bits[:1]
    problem = make_problem(context=1, bits=bits)
    problem = dataclasses.replace(problem, target=least_bytes(problem))
    plan = allocate(name, problem)
    assert (plan.capacity == 1).all()
    assert not plan.sink.any()


def test_snapkv_and_h2o_protect_their_recent_tokens(make_problem) -> None:
    snap = allocate("uniform", make_problem(policy="snapkv", context=2048, window=2048))
    assert (snap.recent == 128).all()
    assert (snap.sink == 4).all()
    h2o = allocate("uniform", make_problem(policy="h2o", context=2048, window=2048))
    assert (np.abs(2 * h2o.recent - (h2o.capacity - 4)) <= 1).all()


@pytest.mark.parametrize("name", [name for name in ALLOCATORS if "recent" in ALLOCATORS[name].policies])
def test_the_optimum_predicts_no_more_loss_than_any_other(make_problem, name) -> None:
    for seed in range(5):
        problem = make_problem(layers=6, points=30, seed=seed)
        other = allocate(name, problem)
        assert math.isfinite(other.loss)
        assert allocate("optimal", problem).loss <= other.loss * (1 + 1e-6)


def test_default_policies() -> None:
    assert {name: default_policy(name) for name in ALLOCATORS} == {
        "optimal": "recent", "uniform": "recent", "baklava": "recent", "squeeze": "recent", "surfacelogic": "snapkv",
        "pyramid": "snapkv", "duo": "recent",
    }  # fmt: skip
