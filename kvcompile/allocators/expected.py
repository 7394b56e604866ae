"""From the sum of heads' losses to what such a plan loses when it is run.

Losses of single heads add up over two decades and not beyond: below, any change of a cache costs what the rounding of
the model's own arithmetic costs; above, heads no longer make up for each other. The profile has run whole plans
(`Profile.checks`), and says what was measured of which sum.
"""

from __future__ import annotations

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from kvcompile.stages import Profile


def expected(profile: Profile, loss: float) -> float:
    """KL in nats a token that is measured of plans whose heads' losses, times the profile's factor, add up to `loss`:
    the best rising curve through the plans that were run, linear in logarithms; before the first of them the same,
    after the last in proportion. 0 of no loss, and `loss` itself where too few plans were run.
    """
    checks = profile.checks
    usable = checks[(checks > 0).all(1)]
    if loss <= 0 or not np.isfinite(loss) or len(usable) < 3:
        return loss
    sums, measured = rising(np.log(usable))
    raw = np.log(loss / profile.factor)
    beyond = max(0.0, raw - sums[-1])
    return float(np.exp(np.interp(raw, sums, measured) + beyond))


def rising(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points [N, 2] as the steps of the rising curve with the least squared error: where it is flat, their means."""
    points = points[np.argsort(points[:, 0], kind="stable")]
    fitted = scipy.optimize.isotonic_regression(points[:, 1])
    steps = [slice(a, b) for a, b in zip(fitted.blocks[:-1], fitted.blocks[1:], strict=True)]
    return np.array([points[s, 0].mean() for s in steps]), np.array([points[s, 1].mean() for s in steps])
