"""Improving a plan by measuring it: curves are estimates, and a real forward pass has the last word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from kvcompile.allocators.predicted import family_losses, objective, predicted_loss
from kvcompile.allocators.programme import gap
from kvcompile.allocators.registry import allocate
from kvcompile.stages import Plan, Problem, Profile, Tools

TILTS = (
    ("narrow", 2.0),
    ("evict", 2.0),
    ("late", 2.0),
    ("early", 2.0),
    ("narrow", 4.0),
    ("worst", 4.0),
)
"""What a round doubts, and the factor it believes in instead: the losses of fewer bits, of eviction, of the later or
earlier half of the layers, or how unequal heads are (`worst` multiplies the losses of the tenth of heads that lose
most). The names stand in the solver's report of an artifact."""


def solve(name: str, problem: Problem, tools: Tools | None = None, rounds: int = 0) -> Plan:
    """As `allocate`; where a model is at hand, with its perplexity, and the plan of `optimal` improved by measuring in
    so many `rounds`."""
    if tools is None:
        return allocate(name, problem)
    problem = dataclasses.replace(problem, perplexity=tools.perplexity(problem))
    plan = allocate(name, problem)
    return refine_plan(problem, plan, partial(tools.kl, problem), rounds) if rounds and name == "optimal" else plan


def refine_plan(problem: Problem, plan: Plan, kl: Callable[[Plan], float], rounds: int) -> Plan:
    """Try `rounds` other plans, each solved from curves in which one thing is doubted, and keep one only where `kl`,
    the measured divergence of a plan in nats a token, is lower than that of the best so far. The doubts that were right
    stay in the curves of the following rounds. The report says what was tried and measured.
    """
    best, least = plan, kl(plan)
    tried: list[dict[str, Any]] = [{"doubt": "none", "measured": least}]
    profile = problem.profile
    for number in range(rounds):
        doubt, factor = TILTS[number % len(TILTS)]
        believed = tilted(profile, doubt, factor)
        trial = allocate("optimal", dataclasses.replace(problem, profile=believed))
        measured = kl(trial)
        tried.append({"doubt": f"{doubt} x {factor:g}", "measured": measured})
        if measured < least:
            best, least, profile = trial, measured, believed
    # The losses stay those of the profile as measured, so that plans can be compared.
    families = family_losses(problem, best)
    report = {
        **plan.report,
        "objective": objective(families),
        "gap": gap(objective(families), float(plan.report.get("bound", 0.0))),
        "families": dict(zip(problem.profile.families, families.tolist(), strict=True)),
        "refined": tried,
        "measured_kl": least,
    }
    if "target_used" in best.report:
        report["target_used"] = best.report["target_used"]
    return dataclasses.replace(best, loss=predicted_loss(problem, best), report=report)


def tilted(profile: Profile, doubt: str, factor: float) -> Profile:
    """The profile with one kind of loss multiplied."""
    heads = np.ones(profile.baklava.shape, np.float32)
    half = len(heads) // 2
    if doubt == "late":
        heads[half:] = factor
    elif doubt == "early":
        heads[:half] = factor
    elif doubt == "worst":
        # Of every head [L, H] the loss at the middle budget, the mean over families, under its best policy.
        middle = profile.loss[..., profile.loss.shape[-1] // 2].mean(0).min(-1)
        heads[middle >= np.quantile(middle, 0.9)] = factor
    quantised = factor if doubt == "narrow" else 1.0
    evict = factor if doubt == "evict" else 1.0
    kept = profile.kept
    if kept is not None:
        key, value = ((t * heads[..., None, None] * quantised).astype(np.float32) for t in (kept.key, kept.value))
        kept = dataclasses.replace(kept, key=key, value=value)
    return dataclasses.replace(
        profile,
        kept=kept,
        loss=(profile.loss * heads[..., None, None] * evict).astype(np.float32),
        key_loss=(profile.key_loss * heads[..., None] * quantised).astype(np.float32),
        value_loss=(profile.value_loss * heads[..., None] * quantised).astype(np.float32),
    )
