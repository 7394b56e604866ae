"""Plans along the memory axis that are run for real, to see how far the curves can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from kvcompile.artifacts import POLICIES
from kvcompile.profile.curves import ring
from kvcompile.stages import Plan, Profile

CHECKS = 12
"""Plans that are run."""

PRICES = (3e-5, 3e-2)
"""Nats a token that a whole head's full cache may cost, from the dearest plan to the cheapest."""

NOISE = 1e-3
"""Predicted KL below this is about what rounding in bfloat16 costs anyway, whatever the plan."""

OWN_BITS = 16
"""What an element of the cache's own type counts as here, where only proportions matter."""


@dataclass(frozen=True)
class Sample:
    """A plan for contexts of the profile's window, and its predicted loss in each family, float64 [F]."""

    plan: Plan
    losses: NDArray[np.float64]


def sample_plan(profile: Profile, number: int, seed: int, sink: int) -> Sample:
    """The best choice of every head at a price for bytes that rises with `number`; every second plan leaves a random
    half of the heads whole."""
    # Choices of a head: share x budget x key width x value width.
    loss = profile.loss[..., None, None].astype(np.float64)
    pad = ((0, 0), (0, 0), (0, 0), (1, 0))
    keys, values = np.pad(profile.key_loss, pad), np.pad(profile.value_loss, pad)
    loss = loss + keys[:, :, :, None, None, :, None] + values[:, :, :, None, None, None, :]
    widths = np.array([OWN_BITS, *profile.bits.tolist()])
    size = profile.tokens[:, None, None] * (widths[:, None] + widths) / (2.0 * OWN_BITS * profile.window)
    mean = loss.mean(0)
    price = np.geomspace(*PRICES, CHECKS)[number]
    heads = mean.shape[:2]
    best = (mean + price * size[None]).reshape(*heads, -1).argmin(-1)
    if number % 2:
        whole = np.ravel_multi_index((0, len(profile.tokens) - 1, 0, 0), mean.shape[2:])
        best = np.where(np.random.default_rng((seed, number)).random(heads) < 0.5, whole, best)
    share, budget, k, v = np.unravel_index(best, mean.shape[2:])
    capacity = profile.tokens[budget]
    recent = np.vectorize(lambda s, c: ring(int(c), float(profile.shares[s]), sink))(share, capacity)
    scored = profile.shares[share] < 1
    plan = Plan(
        policy=np.where(scored, POLICIES.index("scored"), POLICIES.index("recent")).astype(np.uint8),
        capacity=capacity.astype(np.int32),
        sink=np.full(heads, sink, np.int32),
        recent=recent.astype(np.int32),
        k_bits=widths[k].astype(np.uint8),
        v_bits=widths[v].astype(np.uint8),
        loss=float("nan"),
    )
    chosen = np.take_along_axis(loss.reshape(len(loss), *heads, -1), best[None, ..., None], axis=-1)
    return Sample(plan, chosen.sum((1, 2, 3)))


def agreement(checks: NDArray[np.float64]) -> tuple[float, float]:
    """From predicted and measured KL [N, 2]: the factor from one to the other (the median, of plans that are clear of
    noise) and Spearman's rank correlation (of all)."""
    usable = checks[(checks > 0).all(1)]
    if len(usable) < 3:
        return 1.0, float("nan")
    clear = usable[usable[:, 0] > NOISE] if (usable[:, 0] > NOISE).sum() > 2 else usable
    # Not a mean: where nearly everything is cut, losses of heads no longer add up, and measure 40 times what they say.
    factor = float(np.median(clear[:, 1] / clear[:, 0]))
    return factor, float(scipy.stats.spearmanr(usable[:, 0], usable[:, 1]).statistic)
