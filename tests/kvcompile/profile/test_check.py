"""Whether predictions hold for whole plans."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from profiles import material
from scipy.stats import spearmanr
from tiny_models import CONFIGS, tiny_model

from kvcompile.allocators import allocate
from kvcompile.artifacts import identify
from kvcompile.problem import Options, parse_memory, pose_with, resolve_target
from kvcompile.profile import measure
from kvcompile.profile.check import agreement
from kvcompile.profile.simulate import plan_divergence
from kvcompile.stages import Problem


def test_agreement_is_the_median_ratio_and_the_rank_correlation() -> None:
    """Plans below the noise, and those whose losses no longer add up, leave the factor alone."""
    predicted = np.geomspace(1e-4, 1e-1, 12)
    ratio = np.array([90, 80, 70, 60, 3, 3, 2, 4, 50, 60, 70, 80])
    checks = np.stack([predicted, ratio * predicted], axis=1)
    factor, correlation = agreement(checks)
    assert factor == pytest.approx(3)
    assert correlation == pytest.approx(spearmanr(*checks.T).statistic)
    assert agreement(np.zeros((12, 2)))[0] == 1.0


def test_sliding_windows_are_left_alone() -> None:
    """Gemma-3's of 24 tokens, in contexts of 48: no plan has a say in these layers, so that whole plans cost what the
    other ones lose, in the profile and with --refine, and none where nothing is known of less than the window."""
    model = tiny_model(CONFIGS["gemma3"])
    texts = replace(material(), checks=4)
    measured = measure(model, texts, seed=0)
    predicted, found = np.array(measured.checks).T
    assert (found < 20 * predicted + 1e-5).all()

    identity = identify(model, "tiny")
    sliding = np.array(identity.windows) > 0

    def problem(context: int, share: str) -> Problem:
        options = Options(context, 1)
        target = resolve_target(identity, parse_memory(share), context, 1, options.kv_dtype)
        return pose_with(identity, measured.parts, target, options)

    for context in (48, 192):
        posed = problem(context, "99.9%")
        assert (posed.fixed == sliding).all()
        assert plan_divergence(model, texts.measure, allocate("optimal", posed), measured.parts, posed) < 1e-5
    short = problem(24, "90%")
    plan = allocate("optimal", short)
    assert (short.fixed == sliding).all()
    assert (plan.capacity[sliding] == 24).all()
    assert (plan.k_bits[sliding] == short.dtype_bits).all()
