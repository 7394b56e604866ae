"""The last stage: whole plans are run for real, to see how far the curves can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from kvcompile.artifacts import POLICIES
from kvcompile.kernels.codecs import codec_of
from kvcompile.profile.context import pack, read_context
from kvcompile.profile.eviction import ring
from kvcompile.profile.fit import Fit
from kvcompile.profile.result import profile_of
from kvcompile.profile.resume import Sums
from kvcompile.profile.setting import Episode, Setting, asked_tokens, tokens_of
from kvcompile.profile.simulate import divergence, reference
from kvcompile.profile.structure import Tick
from kvcompile.stages import Plan, Profile

CHECKS = 12
"""Plans that are run."""

PRICES = (3e-5, 3e-2)
"""Nats a token that a whole head's full cache may cost, from the dearest plan to the cheapest."""

ADDITIVE = (1e-3, 1e-2)
"""Predicted KL between which losses of heads add up. Below, what is measured is what bfloat16 costs anyway, whatever
the plan; above, nearly everything is cut, and up to 40 times the sum is measured."""

CACHE_BITS = 16
"""What an element of the cache dtype counts as here, where only proportions matter."""


class Check:
    """`checks` [CHECKS, 2]: the predicted and the measured KL of every plan, both the mean of an episode's text and its
    questions."""

    def __init__(self, setting: Setting, fit: Fit) -> None:
        self.setting, self.fit = setting, fit
        episodes = _one_each(setting)
        # An episode of each family, read once, and the numbers of the plans that are run on it.
        self.items = [(episode, range(i, CHECKS, len(episodes))) for i, episode in enumerate(episodes)]
        self.work = [setting.work(tokens_of(e) + len(plans) * asked_tokens(e)) for e, plans in self.items]

    def fresh(self) -> Sums:
        return {"checks": np.zeros((CHECKS, 2))}

    def add(self, sums: Sums, number: int, tick: Tick) -> None:
        setting, model, (episode, plans) = self.setting, self.setting.model, self.items[number]
        fitted = self.fit.result(sums)
        profile = profile_of(sums, setting)
        families = list(setting.rows(episode))
        context = read_context(model, episode.context, tick)
        known = reference(model, context, pack(len(context), episode.follow_ups), tick)
        for i in plans:
            sample = sample_plan(profile, i, setting.seed, setting.sink)
            found = divergence(model, known, sample.plan, fitted.scorer, fitted.quantiser, profile.window, tick)
            text = (found["continuation"] + found["quote"]) / 2
            sums["checks"][i] = sample.losses[families].mean(), (text + found["question"]) / 2


def _one_each(setting: Setting) -> list[Episode]:
    """The first episode of every family."""
    first: dict[str, Episode] = {}
    for episode in setting.material.measure:
        first.setdefault(episode.family, episode)
    return list(first.values())


@dataclass(frozen=True)
class Sample:
    """A plan for contexts of the profile's window, and its predicted loss in each family, float64 [F]."""

    plan: Plan
    losses: NDArray[np.float64]


def sample_plan(profile: Profile, number: int, seed: int, sink: int) -> Sample:
    """The best choice of every head at a price for bytes that rises with `number`; every second plan leaves a random
    half of the heads whole."""
    # Loss of every choice of a head, [F, L, H, P, C, 1 + Qk, 1 + Qv]: share x budget x bits of keys x bits of values,
    # where the cache dtype comes first and loses nothing.
    loss = profile.loss[..., None, None].astype(np.float64)
    pad = ((0, 0), (0, 0), (0, 0), (1, 0))
    keys, values = np.pad(profile.key_loss, pad), np.pad(profile.value_loss, pad)
    loss = loss + keys[:, :, :, None, None, :, None] + values[:, :, :, None, None, None, :]
    k_bits, v_bits = (np.array([CACHE_BITS, *known.tolist()]) for known in (profile.key_bits, profile.value_bits))
    k_size, v_size = (np.array([_element_bits(int(id)) for id in known]) for known in (k_bits, v_bits))
    # As a share of the head's full cache, [C, 1 + Qk, 1 + Qv]. Scales and anchors hardly count.
    size = profile.tokens[:, None, None] * (k_size[:, None] + v_size) / (2.0 * CACHE_BITS * profile.window)
    mean = loss.mean(0)
    # argmin of loss + price x size: the Lagrangian of a memory target, so these are plans that solving would propose.
    price = np.geomspace(*PRICES, CHECKS)[number]
    heads = mean.shape[:2]
    best = (mean + price * size[None]).reshape(*heads, -1).argmin(-1)
    if number % 2:
        # One price cuts all heads alike; with whole heads among them, plans differ in more than how much they cut.
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
        k_bits=k_bits[k].astype(np.uint8),
        v_bits=v_bits[v].astype(np.uint8),
        loss=float("nan"),
    )
    chosen = np.take_along_axis(loss.reshape(len(loss), *heads, -1), best[None, ..., None], axis=-1)
    return Sample(plan, chosen.sum((1, 2, 3)))


def _element_bits(id: int) -> int:
    return CACHE_BITS if id == CACHE_BITS else codec_of(id).bits


def agreement(checks: NDArray[np.float64]) -> tuple[float, float]:
    """From predicted and measured KL [N, 2]: the factor from one to the other (the median, of plans whose losses add
    up) and Spearman's rank correlation (of all)."""
    usable = checks[(checks > 0).all(1)]
    if len(usable) < 3:
        return 1.0, float("nan")
    additive = (usable[:, 0] > ADDITIVE[0]) & (usable[:, 0] < ADDITIVE[1])
    trusted = usable[additive] if additive.sum() > 2 else usable
    factor = float(np.median(trusted[:, 1] / trusted[:, 0]))
    return factor, float(scipy.stats.spearmanr(usable[:, 0], usable[:, 1]).statistic)
