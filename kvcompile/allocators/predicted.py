"""The profile's losses at the problem's context, for any choice of a head."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.expected import expected
from kvcompile.artifacts import POLICIES
from kvcompile.stages import DEFAULT_SINK, RETRIEVAL, WORST, Plan, Problem


def grid(problem: Problem) -> NDArray[np.float64]:
    """The curves' token axis at the problem's context: beyond the sinks, budgets are taken to matter as shares of the
    context, so that a profile on shorter contexts serves a longer one."""
    return DEFAULT_SINK + (problem.profile.tokens.astype(np.float64) - DEFAULT_SINK) * _stretch(problem)


def _stretch(problem: Problem) -> float:
    """Tokens of the problem's context for one of the profile's."""
    return max(problem.context - DEFAULT_SINK, 1) / max(problem.profile.window - DEFAULT_SINK, 1)


def evicted(problem: Problem, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Predicted loss of keeping `tokens` [T] of them, in every family, head and share: [F, L, H, P, T]. Linear between
    the measured budgets, 0 where a head is full."""
    axis, loss = grid(problem), problem.profile.loss.astype(np.float64)
    place = np.clip(np.searchsorted(axis, tokens, side="right") - 1, 0, len(axis) - 2) if len(axis) > 1 else 0
    if len(axis) == 1:
        table = np.repeat(loss, len(tokens), axis=-1)
    else:
        along = np.clip((tokens - axis[place]) / (axis[place + 1] - axis[place]), 0.0, 1.0)
        table = loss[..., place] * (1 - along) + loss[..., place + 1] * along
    full = tokens >= problem.limit.astype(np.int64)[:, None]
    return problem.profile.factor * np.where(full[:, None, None, :], 0.0, table)


def quantised(problem: Problem, kind: str, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Predicted loss of storing keys or values (`kind`) in each of the problem's bits for them, where a head keeps
    `tokens` [T]: [F, L, H, T, W]. 0 for the cache dtype, and for a codec without curves: such a one was asked for by
    name and is that of every head, so that no choice depends on it (`unmeasured`)."""
    loss = problem.profile.codec_loss(kind, DEFAULT_SINK + (tokens - DEFAULT_SINK) / _stretch(problem))
    if kind == "key":
        loss = loss * np.asarray(problem.key_growth)[..., None, None]
    known, asked = getattr(problem.profile, f"{kind}_bits").tolist(), getattr(problem, f"{kind}_bits")
    columns = [loss[..., known.index(w)] if w in known else np.zeros(loss.shape[:-1]) for w in asked]
    return problem.profile.factor * np.stack(columns, axis=-1)


def unmeasured(problem: Problem) -> bool:
    """Whether the problem has a codec whose loss was not profiled."""
    profile, own = problem.profile, {problem.dtype_bits}
    keys = {*problem.key_bits} - {*profile.key_bits.tolist()}
    values = {*problem.value_bits} - {*profile.value_bits.tolist()}
    return bool((keys | values) - own)


def family_losses(problem: Problem, plan: Plan) -> NDArray[np.float64]:
    """Predicted loss of a plan in every family, [F]; NaN where it uses a policy without curves. Layers that keep their
    own window lose nothing."""
    names = np.array(POLICIES)[plan.policy]
    if not np.isin(names, ("full", "recent", "scored")).all():
        return np.full(len(problem.profile.families), math.nan)
    shares = problem.profile.shares
    total = np.zeros(len(problem.profile.families))
    for layer in np.flatnonzero(~problem.fixed).tolist():
        capacity = plan.capacity[layer].astype(np.int64)
        table = evicted(problem, capacity)[:, layer]
        keys, values = (quantised(problem, kind, capacity)[:, layer] for kind in ("key", "value"))
        for head in range(problem.num_kv_heads):
            part = plan.recent[layer, head] / max(plan.capacity[layer, head] - plan.sink[layer, head], 1)
            scored = names[layer, head] == "scored"
            if scored and not (shares < 1).any():
                return np.full(len(total), math.nan)
            share = int(np.abs(np.where(shares < 1, shares, math.inf) - part).argmin()) if scored else 0
            total += table[:, head, share, head]
            total += keys[:, head, head, problem.key_bits.index(int(plan.k_bits[layer, head]))]
            total += values[:, head, head, problem.value_bits.index(int(plan.v_bits[layer, head]))]
    return total


def objective(families: NDArray[np.float64]) -> float:
    """What is minimised: the mean over families plus WORST times the worst."""
    return float(families.mean() + WORST * families.max())


def predicted_loss(problem: Problem, plan: Plan) -> float:
    """Predicted KL of a plan, the mean of texts and questions, in nats a token: what was measured of plans whose heads
    lose as much in all (`expected`). NaN where it uses a policy, or the problem a codec, without curves."""
    if unmeasured(problem):
        return math.nan
    profile, loss = problem.profile, family_losses(problem, plan)
    asked = np.array(profile.families) == RETRIEVAL
    # As plans that were run are measured: an episode's text counts as much as its questions.
    halves = [loss[which].mean() for which in (asked, ~asked) if which.any()]
    return expected(profile, float(np.mean(halves)))
