"""PyramidKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvcompile.allocators.rows import free_tokens
from kvcompile.allocators.uniform import weighted
from kvcompile.stages import Plan, Problem


@dataclass(frozen=True)
class PyramidKV:
    """Layer budgets fall linearly from the first layer to the last (arXiv 2406.02069, equations 3 to 5).

    With B tokens a head on average and an observation window w, the last layer gets (B - w) / beta + w and the first
    2 (B - w) - (B - w) / beta + w.
    """

    beta: float = 20.0
    window: int = 32
    policies: ClassVar[tuple[str, ...]] = ("snapkv", "recent", "h2o", "scored")

    def __call__(self, problem: Problem) -> Plan:
        layers = np.flatnonzero(~problem.fixed)
        mean = free_tokens(problem) / max(1, len(layers) * problem.num_kv_heads)
        window = min(self.window, mean)
        last = (mean - window) / self.beta
        weights = np.zeros((len(problem.limit), problem.num_kv_heads))
        weights[layers] = (window + np.linspace(2 * (mean - window) - last, last, len(layers)))[:, None]
        return weighted(problem, weights, beta=self.beta)
