"""DuoAttention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.predicted import evicted, predicted_loss
from kvcompile.allocators.rows import floors, free_bytes, free_tokens, least_bytes, limits, rows
from kvcompile.stages import Plan, Problem


@dataclass(frozen=True)
class DuoAttention:
    """Some heads full, the others streaming with 128 sinks and 256 recent tokens (arXiv 2410.10819).

    The paper trains a gate a head to tell them apart; our reading without training is the measured loss of the head at
    the streaming budget, largest first. A target too small for streaming heads alone shrinks them all in proportion.
    """

    sink: int = 128
    recent: int = 256
    policies: ClassVar[tuple[str, ...]] = ("recent",)

    def __call__(self, problem: Problem) -> Plan:
        # The first curve is that of the policy `recent`.
        streaming = np.array([streaming_tokens(problem, self.sink, self.recent)])
        damage = evicted(problem, streaming).mean(0)[..., 0, 0]
        return streaming_and_full(problem, damage, np.ones_like(damage, dtype=bool), self.sink, self.recent)


def streaming_tokens(problem: Problem, sink: int, recent: int) -> int:
    """What a streaming head holds: fewer where the target is too small for streaming heads alone."""
    problem, sink = with_sinks(problem, sink)
    active = ~problem.fixed
    limit = int(problem.limit[active].max(initial=1))
    fair = free_tokens(problem) // max(1, int(active.sum()) * problem.num_kv_heads)
    return min(int(np.clip(fair, floors(problem)[active].max(initial=1), sink + recent)), limit)


def with_sinks(problem: Problem, sink: int) -> tuple[Problem, int]:
    """The problem as streaming heads of `sink` sinks meet it, whose exact copies of token 0 take bytes even where the
    problem has no sinks, and their sinks: none where the target is too small for these copies."""
    streams = dataclasses.replace(problem, sink=max(problem.sink, min(sink, 1)))
    return (streams, sink) if least_bytes(streams) <= problem.target else (problem, 0)


def streaming_and_full(
    problem: Problem, score: NDArray[np.float64], eligible: NDArray[np.bool_], sink: int, recent: int
) -> Plan:
    """Of the `eligible` heads [L, H] as many full ones as the target holds, those of the largest `score` [L, H] first;
    the others stream."""
    active = ~problem.fixed
    tokens = limits(problem)
    limit, streaming = int(problem.limit[active].max(initial=1)), streaming_tokens(problem, sink, recent)
    streams, sink = with_sinks(problem, sink)
    heads, slot = np.argwhere(eligible & active[:, None]), problem.slot_bytes("recent")
    spare = free_bytes(streams) - streaming * int(active.sum()) * problem.num_kv_heads * slot
    # A full head has the problem's sinks in place of the streaming heads', and no copy of token 0 without any.
    more = (limit - streaming) * slot + problem.anchor_bytes() - streams.anchor_bytes()
    count = min(len(heads), max(0, spare) // more) if more > 0 else len(heads)
    tokens[active] = streaming
    for i, h in heads[np.argsort(-score[tuple(heads.T)], kind="stable")[:count]]:
        tokens[i, h] = limit

    plan = rows(problem, tokens, report={"full_heads": int(count), "streaming_tokens": streaming})
    first = min(sink, max(1, streaming * sink // (sink + recent)), streaming - 1)
    narrow = (tokens == streaming) & active[:, None] & (tokens < limits(problem))
    plan = dataclasses.replace(
        plan,
        sink=np.where(narrow, first, plan.sink).astype(np.int32),
        recent=np.where(narrow, streaming - first, plan.recent).astype(np.int32),
    )
    return dataclasses.replace(plan, loss=predicted_loss(problem, plan))
