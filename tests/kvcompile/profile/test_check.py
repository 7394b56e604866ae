"""Whether predictions hold for whole plans."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from kvcompile.profile.check import agreement


def test_agreement_is_the_median_ratio_and_the_rank_correlation() -> None:
    """Plans below the noise, and those whose losses no longer add up, leave the factor alone."""
    predicted = np.geomspace(1e-4, 1e-1, 12)
    ratio = np.array([90, 80, 70, 60, 3, 3, 2, 4, 50, 60, 70, 80])
    checks = np.stack([predicted, ratio * predicted], axis=1)
    factor, correlation = agreement(checks)
    assert factor == pytest.approx(3)
    assert correlation == pytest.approx(spearmanr(*checks.T).statistic)
    assert agreement(np.zeros((12, 2)))[0] == 1.0
