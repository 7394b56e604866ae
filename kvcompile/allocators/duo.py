"""DuoAttention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvcompile.allocators.curves import evicted, predicted_loss
from kvcompile.allocators.rows import floors, free_tokens, limits, rows
from kvcompile.problem import Plan, Problem


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
        active = ~problem.fixed
        tokens, total = limits(problem), free_tokens(problem)
        heads = np.argwhere(np.broadcast_to(active[:, None], tokens.shape))
        limit = int(problem.limit[active].max(initial=1))
        streaming = int(
            np.clip(total // max(1, len(heads)), floors(problem)[active].max(initial=1), self.sink + self.recent)
        )
        streaming = min(streaming, limit)
        # The first curve is that of the policy `recent`.
        damage = evicted(problem, np.array([streaming])).mean(0)[heads[:, 0], heads[:, 1], 0, 0]
        spare = total - streaming * len(heads)
        count = min(len(heads), spare // (limit - streaming)) if limit > streaming else len(heads)
        tokens[active] = streaming
        for i, h in heads[np.argsort(-damage, kind="stable")[:count]]:
            tokens[i, h] = limit

        plan = rows(problem, tokens, report={"full_heads": int(count), "streaming_tokens": streaming})
        sink = min(self.sink, max(1, streaming * self.sink // (self.sink + self.recent)), streaming - 1)
        narrow = (tokens == streaming) & active[:, None] & (tokens < limits(problem))
        plan = dataclasses.replace(
            plan,
            sink=np.where(narrow, sink, plan.sink).astype(np.int32),
            recent=np.where(narrow, streaming - sink, plan.recent).astype(np.int32),
        )
        return dataclasses.replace(plan, loss=predicted_loss(problem, plan))
