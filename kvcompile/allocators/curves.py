"""The profile's loss curves at the problem's context."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import POLICIES
from kvcompile.problem import DEFAULT_SINK, Plan, Problem


def grid(problem: Problem) -> NDArray[np.float64]:
    """The curves' token axis at the problem's context: beyond the sinks, budgets are taken to matter as shares of the
    context, so that a profile on shorter windows serves a longer context."""
    stretch = (problem.context - DEFAULT_SINK) / (problem.profile.window - DEFAULT_SINK)
    return DEFAULT_SINK + (problem.profile.tokens.astype(np.float64) - DEFAULT_SINK) * stretch


def loss_at(problem: Problem, layer: int, head: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Predicted loss of one head at budgets of `tokens`, linear between the measured points."""
    measured = problem.profile.recent_loss[layer, head]
    return np.where(tokens >= problem.limit[layer], 0.0, np.interp(tokens, grid(problem), measured))


def predicted_loss(problem: Problem, plan: Plan) -> float:
    """Sum over heads of the loss that the curves predict for a plan; NaN where it uses a policy without curves."""
    known = [POLICIES.index("full"), POLICIES.index("recent")]
    if not np.isin(plan.policy, known).all():
        return math.nan
    tokens = plan.capacity.astype(np.int64)
    layers = np.flatnonzero(~problem.fixed).tolist()
    heads = [(i, h) for i in layers for h in range(problem.num_kv_heads)]
    return float(sum(loss_at(problem, i, h, tokens[i, h : h + 1])[0] for i, h in heads))
