"""SurfaceLogicKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvcompile.allocators.uniform import weighted
from kvcompile.stages import Plan, Problem


@dataclass(frozen=True)
class SurfaceLogicKV:
    """A fixed budget for every head, and the rest by inference score (arXiv 2508.15806).

    Our reading, from the same authors' earlier published code: a head's share is INFsc + 0.01 INFsc / (its layer's
    sum), normalised over all heads, and the part shared so is 1/1.351 of the total.
    """

    dynamic: float = 1 / 1.351
    policies: ClassVar[tuple[str, ...]] = ("snapkv", "recent", "h2o", "scored")

    def __call__(self, problem: Problem) -> Plan:
        active = ~problem.fixed
        score = problem.profile.surfacelogic[active].astype(np.float64)
        raw = score + 0.01 * score / np.maximum(score.sum(axis=1, keepdims=True), 1e-12)
        part = raw / raw.sum() if raw.sum() > 0 else np.full(raw.shape, 1 / raw.size)
        weights = np.zeros((len(problem.limit), problem.num_kv_heads))
        weights[active] = (1 - self.dynamic) / raw.size + self.dynamic * part
        return weighted(problem, weights, dynamic=self.dynamic)
