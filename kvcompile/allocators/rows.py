"""From tokens a head to the rows of a plan, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import POLICIES, Budgets, resident_bytes, vector_bytes
from kvcompile.stages import Plan, Problem

OBSERVED = 32
"""Queries at the prompt's end that SnapKV observes; they stay in its ring."""


def limits(problem: Problem) -> NDArray[np.int64]:
    """Tokens at which each head is full, [L, H]."""
    return np.repeat(problem.limit.astype(np.int64)[:, None], problem.num_kv_heads, axis=1)


def floors(problem: Problem) -> NDArray[np.int64]:
    """Fewest tokens a head can hold, [L, H]: its sinks and the newest one; a sliding layer, its window."""
    most = limits(problem)
    return np.where(problem.fixed[:, None], most, np.minimum(problem.sink + 1, most))


def least_bytes(problem: Problem) -> int:
    """Bytes of one sequence below which no plan exists: every head at its fewest tokens, in the fewest bits that the
    allocator may choose."""
    fewest = rows(problem, floors(problem))
    k, v = (min(b, key=partial(vector_bytes, problem.head_dim)) for b in (problem.key_bits, problem.value_bits))
    own = problem.fixed[:, None]
    narrowest = replace(
        fewest,
        k_bits=np.where(own, fewest.k_bits, k).astype(np.uint8),
        v_bits=np.where(own, fewest.v_bits, v).astype(np.uint8),
    )
    # Few bits can take more than sixteen where a head has few slots, for its exact copy of token 0.
    return min(plan_bytes(problem, plan) for plan in (fewest, narrowest))


def free_tokens(problem: Problem) -> int:
    """Tokens of the problem's policy that the target holds beside the layers that keep their own window."""
    return free_bytes(problem) // problem.slot_bytes(problem.policy)


def free_bytes(problem: Problem) -> int:
    """Bytes for slots beside the layers that keep their own window and every other head's exact copy of token 0."""
    own = int(limits(problem)[problem.fixed].sum()) * problem.slot_bytes(
        "recent", problem.dtype_bits, problem.dtype_bits
    )
    others = int((~problem.fixed).sum()) * problem.num_kv_heads
    return problem.target - own - others * problem.anchor_bytes()


def all_full(problem: Problem) -> Plan:
    """The full cache, in the first of the problem's bits each; `loss` is for the allocator to say."""
    return rows(problem, limits(problem))


def rows(
    problem: Problem,
    tokens: NDArray[np.int64],
    *,
    loss: float = math.nan,
    report: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan in which head [l, h] holds `tokens[l, h]` under the problem's policy; a head at its limit is `full`.

    `recent` keeps its sinks and a ring of all the rest. `h2o` halves what is left after the sinks between recent tokens
    and heavy hitters (arXiv 2306.14048, section 5). `snapkv` keeps a quarter as a ring for generated tokens, and at
    least its observation window (our choice: SnapKV itself never evicts while it generates). `scored` keeps an eighth
    as a ring of recent tokens.
    """
    most = limits(problem)
    sink = np.minimum(problem.sink, tokens - 1)
    left = tokens - sink
    ring = {
        "recent": left,
        "h2o": np.maximum(left // 2, 1),
        "snapkv": np.minimum(left, np.maximum(OBSERVED, tokens // 4)),
        "scored": np.maximum(left // 8, 1),
    }[problem.policy]
    full, fixed = tokens == most, np.broadcast_to(problem.fixed[:, None], tokens.shape)
    policy = np.where(full, POLICIES.index("full"), POLICIES.index(problem.policy))
    k_bits, v_bits = (np.where(fixed, problem.dtype_bits, b[0]) for b in (problem.key_bits, problem.value_bits))
    return Plan(
        policy=np.where(fixed, POLICIES.index("recent"), policy).astype(np.uint8),
        capacity=tokens.astype(np.int32),
        sink=np.where(fixed, 0, sink).astype(np.int32),
        recent=np.where(fixed, tokens, np.where(full, left, ring)).astype(np.int32),
        k_bits=k_bits.astype(np.uint8),
        v_bits=v_bits.astype(np.uint8),
        loss=loss,
        report=dict(report or {}),
    )


def plan_bytes(problem: Problem, plan: Plan) -> int:
    """Bytes of one sequence's cache under a plan."""
    budgets = Budgets(
        plan.policy, plan.capacity, plan.sink, plan.recent, plan.k_bits, plan.v_bits, head_order=plan.capacity
    )
    return resident_bytes(budgets, problem.head_dim, problem.dtype_bits)
