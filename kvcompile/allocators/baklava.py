"""BaKlaVa."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvcompile.allocators.uniform import weighted
from kvcompile.stages import Plan, Problem


@dataclass(frozen=True)
class BaKlaVa:
    """Important heads grow, unimportant ones shrink, and perplexity says by how much (arXiv 2502.13176).

    The paper gives the importance (profile.baklava, head times layer) and the parameter search. How a pair of
    parameters makes budgets is our reading: the heads below the quantile `tau` of importance get the fraction `p` of
    the mean budget, and the others share the rest evenly. Every pair is measured where a model is at hand; without one
    the middle of the grid is taken. Equal budgets take part in the search.
    """

    taus: tuple[float, ...] = (0.25, 0.5, 0.75)
    fractions: tuple[float, ...] = (0.3, 0.5, 0.7)
    policies: ClassVar[tuple[str, ...]] = ("recent", "scored")

    def __call__(self, problem: Problem) -> Plan:
        if problem.perplexity is None:
            middle = self.taus[len(self.taus) // 2], self.fractions[len(self.fractions) // 2]
            return self._plan(problem, *middle)
        plans = [self._plan(problem, 0.0, 1.0)]
        plans += [self._plan(problem, tau, p) for tau in self.taus for p in self.fractions]
        measured = [problem.perplexity(plan.capacity) for plan in plans]
        best = plans[int(np.argmin(measured))]
        trials = [{**plan.report, "perplexity": value} for plan, value in zip(plans, measured, strict=True)]
        return dataclasses.replace(best, report={**best.report, "trials": trials})

    def _plan(self, problem: Problem, tau: float, p: float) -> Plan:
        active = ~problem.fixed
        score = problem.profile.baklava[active].astype(np.float64)
        low = score < np.quantile(score, tau)
        weights = np.zeros((len(problem.limit), problem.num_kv_heads))
        weights[active] = np.where(low, p, (low.size - p * low.sum()) / max(1, low.size - low.sum()))
        return weighted(problem, weights, tau=tau, p=p)
