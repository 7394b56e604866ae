"""What is measured of plans, from the sum of their heads' losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.allocators.expected import expected, rising

PLANS = np.array([[1e-4, 2e-3], [3e-4, 1e-3], [1e-3, 4e-3], [1e-2, 3e-2], [2e-2, 0.5]], np.float32)
"""Noise, two decades that add up, and a plan that fails."""


def test_it_goes_through_the_plans_that_were_run(make_problem) -> None:
    profile = replace(make_problem().profile, factor=2.0, checks=PLANS)
    for summed, measured in PLANS[2:]:
        assert expected(profile, 2.0 * float(summed)) == pytest.approx(measured, rel=1e-5)
    noise = expected(profile, 1e-9)
    assert noise == pytest.approx(np.sqrt(2e-3 * 1e-3), rel=1e-5)  # of two plans in the wrong order, the mean
    assert expected(profile, 0.4) == pytest.approx(5.0, rel=1e-5)  # ten times the last one
    assert expected(profile, 0.0) == 0.0
    assert np.isnan(expected(profile, float("nan")))


def test_without_plans_it_is_the_sum(make_problem) -> None:
    profile = make_problem().profile
    assert expected(profile, 0.25) == 0.25
    assert expected(replace(profile, checks=PLANS[:2]), 0.25) == 0.25


@given(logs=st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), min_size=3, max_size=12))
def test_more_loss_is_never_less(logs: list[tuple[float, float]]) -> None:
    sums, measured = rising(np.array(logs))
    assert (np.diff(sums) >= -1e-12).all()
    assert (np.diff(measured) >= -1e-12).all()
    assert measured.mean() <= 0
