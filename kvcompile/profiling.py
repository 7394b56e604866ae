"""Profiling for the compiler: text, measurement, and the tools that need the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvcompile import compiler
from kvcompile.artifacts import ModelIdentity
from kvcompile.assemble import Parts
from kvcompile.cache_dir import cache_dir
from kvcompile.calibration import Calibration, calibrate
from kvcompile.compiler import Report, Tools
from kvcompile.problem import DEFAULT_SINK, Plan, Problem
from kvcompile.profile import Material, Profiled, measure, perplexity, plan_divergence, profile_key, read_rotary
from kvcompile.refine import refine_plan


@dataclass(frozen=True)
class ProfiledModel:
    """A model's profile with all that goes into an artifact, and the model itself for what is measured later."""

    model: Any
    text: Calibration
    profiled: Profiled

    @property
    def parts(self) -> Parts:
        return Parts(self.profiled.profile, self.profiled.scorer, self.profiled.quantiser)

    @property
    def calibration(self) -> dict[str, Any]:
        """What an artifact says of it."""
        return {**self.text.describe(), **self.profiled.describe()}

    def tools(self, rounds: int, report: Report | None) -> Tools:
        """What solving can use; plans are refined in so many `rounds`."""
        calls = 0

        def tick(stage: str) -> None:
            nonlocal calls
            calls += 1
            if report is not None:
                report(stage, calls, 0)

        def perplexity_for(problem: Problem) -> Callable[[np.ndarray], float]:
            windows = [episode.context for episode in self.text.measure[: len(self.text.families)]]

            def perplexity_of(capacity: np.ndarray) -> float:
                tick("searching")
                # Budgets are shares of the context: the windows are shorter.
                scaled = np.rint(capacity * (len(windows[0]) / problem.context))
                budgets = np.maximum(scaled, problem.sink + 1).astype(np.int32)
                return perplexity(self.model, windows, budgets, problem.sink)

            return perplexity_of

        def refine(problem: Problem, plan: Plan) -> Plan:
            def kl(trial: Plan) -> float:
                tick("refining")
                return plan_divergence(self.model, self.text.measure, trial, self.profiled, problem)

            return refine_plan(problem, plan, kl, rounds) if rounds else plan

        return Tools(perplexity_for, refine)


def profile_model(
    model: Any,
    tokenizer: Any,
    identity: ModelIdentity,
    *,
    length: int,
    context: int,
    calib: str | os.PathLike[str] | None,
    seed: int,
    report: Report | None,
) -> ProfiledModel:
    """Profile a model on contexts of `length` tokens, or take up the profile that the cache folder has of it, for plans
    of `context` tokens."""
    text = calibrate(
        tokenizer,
        length=length,
        fit=compiler.FIT_EPISODES,
        measure=compiler.MEASURE_EPISODES,
        probes=compiler.PROBES,
        seed=seed,
        path=None if calib is None else Path(calib),
    )
    key = profile_key(
        fingerprint=identity.fingerprint,
        calibration=text.sha256,
        dtype=f"{identity.dtype}, computed in {model.dtype}",
        seed=seed,
        sink=DEFAULT_SINK,
    )
    profiled = measure(
        model,
        Material(text.fit, text.measure, text.probes),
        seed=seed,
        progress=report and (lambda done, total: report("profiling", done, total)),
        store=cache_dir("profiles", key),
    )
    return ProfiledModel(model, text, profiled.for_context(read_rotary(model, context)))
