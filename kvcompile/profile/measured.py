"""What solving can measure with the model at hand: perplexity of budgets, and KL of whole plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.calibration import Calibration
from kvcompile.profile.measure import Profiled
from kvcompile.profile.perplexity import perplexity
from kvcompile.profile.simulate import plan_divergence
from kvcompile.stages import Plan, Problem, Report, Tools


def measuring(model: Any, text: Calibration, profiled: Profiled, report: Report | None) -> Tools:
    """Both measures over the text's episodes; `report` is told of each measurement."""
    calls = 0

    def tick(stage: str) -> None:
        nonlocal calls
        calls += 1
        if report is not None:
            report(stage, calls, 0)

    def perplexity_for(problem: Problem) -> Callable[[NDArray[np.int32]], float]:
        windows = [episode.context for episode in text.measure[: len(text.families)]]

        def perplexity_of(capacity: NDArray[np.int32]) -> float:
            tick("searching")
            # Budgets are shares of the context: the windows are shorter.
            scaled = np.rint(capacity * (len(windows[0]) / problem.context))
            budgets = np.maximum(scaled, problem.sink + 1).astype(np.int32)
            budgets[problem.fixed] = len(windows[0])  # whatever the share, these see what their window lets them see
            return perplexity(model, windows, budgets, problem.sink)

        return perplexity_of

    def kl(problem: Problem, plan: Plan) -> float:
        tick("refining")
        return plan_divergence(model, text.measure, plan, profiled.parts, problem)

    return Tools(perplexity_for, kl)
