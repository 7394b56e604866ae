"""Equal budgets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvcompile.allocators.distribute import share
from kvcompile.allocators.predicted import predicted_loss
from kvcompile.allocators.rows import rows
from kvcompile.stages import Plan, Problem


@dataclass(frozen=True)
class Uniform:
    """Every head the same number of tokens, to the nearest one."""

    policies: ClassVar[tuple[str, ...]] = ("recent", "h2o", "snapkv", "scored")

    def __call__(self, problem: Problem) -> Plan:
        return weighted(problem, np.ones((len(problem.limit), problem.num_kv_heads)))


def weighted(problem: Problem, weights: np.ndarray, **report: object) -> Plan:
    """The plan that divides the free tokens in proportion to `weights` [L, H]."""
    plan = rows(problem, share(problem, weights), report=report)
    return dataclasses.replace(plan, loss=predicted_loss(problem, plan))
