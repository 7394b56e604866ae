"""The last stage: whole plans are run for real, to see how far the curves can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray

from kvcompile.artifacts import POLICIES
from kvcompile.kernels.codecs import codec_of
from kvcompile.profile.attention import Handler, causal
from kvcompile.profile.context import Context, over_context
from kvcompile.profile.curves import Curves
from kvcompile.profile.cut import Left, over_cut, rows_of
from kvcompile.profile.eviction import ring
from kvcompile.profile.fit import Fit
from kvcompile.profile.given import given, lend, lent_names
from kvcompile.profile.held import Held
from kvcompile.profile.job import Additions, Item
from kvcompile.profile.lanes import Reading
from kvcompile.profile.layerwise import after, through
from kvcompile.profile.result import profile_of
from kvcompile.profile.resume import Sums
from kvcompile.profile.rotation import of_layer
from kvcompile.profile.setting import Setting, asked_tokens
from kvcompile.profile.simulate import compared, kinds
from kvcompile.profile.structure import attends, head, layers, place_of, source_layer
from kvcompile.runtime.parts import planned
from kvcompile.stages import Plan, Profile

PRICES = (3e-5, 3e-2)
"""Nats a token that a whole head's full cache may cost, from the dearest plan to the cheapest."""

LESS = 8.0
"""By which the price is divided for half of the heads of every second plan."""

ADDITIVE = (1e-3, 1e-2)
"""Predicted KL between which losses of heads add up. Below, what is measured is what bfloat16 costs anyway, whatever
the plan; above, nearly everything is cut, and up to 40 times the sum is measured."""

CACHE_BITS = 16
"""What an element of the cache dtype counts as here, where only proportions matter."""


class Check:
    """`checks` [N, 2]: the predicted and the measured KL of every plan, both the mean of an episode's text and its
    questions.

    N plans (`Material.checks`) are run on the first episode of every family, over what `Curves` has left of it.
    """

    def __init__(self, setting: Setting, fit: Fit, curves: Curves) -> None:
        self.setting, self.fit, self.curves = setting, fit, curves
        self.episodes = first_episodes(setting)
        self._samples: dict[int, Sample] = {}

    def fresh(self) -> Sums:
        return {"checks": np.zeros((self.setting.material.checks, 2))}

    def at(self, layer: int) -> Iterator[Item]:
        """The items of one layer, a plan each."""
        part = layers(self.setting.model)[layer]
        for plan, reading in self._runs():
            # The first plan is made of the losses of all layers, the one that was just seen on the way down included.
            meets = layer == plan == 0
            run = partial(self._read, layer, plan, reading)
            yield Item(run, part, asked_tokens(reading.episode), reading.number, meets)

    def verdicts(self) -> Iterator[Item]:
        """Items that compare with the full cache, once the plans are through all layers: one an episode, with all plans
        that were run on it."""
        part, runs = head(self.setting.model), list(self._runs())
        for number in dict.fromkeys(reading.number for _, reading in runs):
            plans = [plan for plan, reading in runs if reading.number == number]
            yield Item(partial(self._compare, plans, self.curves.readings[number]), part, owner=number)

    def _runs(self) -> Iterator[tuple[int, Reading]]:
        """Every plan's number, and what it is run on: the episodes in turn."""
        turns = self.episodes
        plans = range(self.setting.material.checks)
        return ((plan, self.curves.readings[turns[plan % len(turns)]]) for plan in plans)

    def _sample(self, sums: Sums, number: int) -> Sample:
        if number not in self._samples:
            setting = self.setting
            price = float(np.geomspace(*PRICES, setting.material.checks)[number])
            self._samples[number] = sample_plan(profile_of(sums, setting), number, price, setting.seed, setting.sink)
        return self._samples[number]

    @torch.no_grad()
    def _read(self, layer: int, number: int, reading: Reading, sums: Sums, held: Held) -> None:
        setting, asked = self.setting, reading.asked
        source = source_layer(setting.model, layer)
        cache = held.get(reading.cache(source))
        before = held.one(_state(number, layer) if layer else asked.at(0))
        part, lent = layers(setting.model)[layer], partial(_lent, number)
        arguments = given(setting, asked, layer, held, lent)
        attend: Handler = causal
        if attends(part):
            attend = over_context(Context([], [cache["key"]], [cache["value"]]), reading.packed)
        if planned(layers(setting.model)[source]):
            rows = rows_of(self._sample(sums, number).plan, place_of(setting.model, source))
            _, quantiser = self.fit.of_layer(sums, source)
            rotary = of_layer(setting.rotary, place_of(setting.model, source))
            cut = over_cut(Left(**cache), reading.packed, rows, quantiser, setting.window, rotary)
            attend = _but_for_windows(cut, attend, cache["key"].shape[1])
        with after(setting.model, part, reading.packed, cache):
            held.put(_state(number, layer + 1), hidden=through(part, before, arguments, attend))
        lend(setting, asked, layer, arguments, held, lent)
        if layer:
            held.drop(_state(number, layer))

    @torch.no_grad()
    def _compare(self, plans: Sequence[int], reading: Reading, sums: Sums, held: Held) -> Additions:
        model, top = self.setting.model, len(layers(self.setting.model))
        full, cut = held.one(reading.asked.at(top))[0], [held.one(_state(plan, top))[0] for plan in plans]
        for plan in plans:
            held.drop(*lent_names(self.setting, partial(_lent, plan)))
        states = [(kind, full[rows], [one[rows] for one in cut]) for kind, rows in compared(reading.packed)]
        additions = []
        for plan, found in zip(plans, kinds(model, states), strict=True):
            text = (found["continuation"] + found["quote"]) / 2
            predicted = self._sample(sums, plan).losses[list(self.setting.rows(reading.episode))].mean()
            additions.append(("checks", plan, np.array([predicted, (text + found["question"]) / 2])))
        return additions


def _but_for_windows(cut: Handler, whole: Handler, length: int) -> Handler:
    """What a plan leaves of a layer, but the `whole` of it where its sliding window is shorter than the context of so
    many tokens: such a layer keeps its own, and `Curves` has no losses of it."""
    return lambda call: whole(call) if call.window is not None and call.window < length else cut(call)


def _lent(number: int, layer: int) -> str:
    """The name of what a layer lends later ones where a plan is run."""
    return f"plan{number}.lent@{layer}"


def _state(number: int, layer: int) -> str:
    """The name of a plan's residual stream before a layer."""
    return f"plan{number}@{layer}"


def first_episodes(setting: Setting) -> list[int]:
    """The number of every family's first episode."""
    first: dict[str, int] = {}
    for number, episode in enumerate(setting.material.measure):
        first.setdefault(episode.family, number)
    return list(first.values())


@dataclass(frozen=True)
class Sample:
    """A plan for contexts of the profile's window, and its predicted loss in each family, float64 [F]."""

    plan: Plan
    losses: NDArray[np.float64]


def sample_plan(profile: Profile, number: int, price: float, seed: int, sink: int) -> Sample:
    """The best choice of every head at a `price` for bytes, in nats a token for a whole head; in every second plan, by
    its `number`, at that price over `LESS` for a random half of the heads."""
    # Loss of every choice of a head, [F, L, H, P, C, 1 + Qk, 1 + Qv]: share x budget x bits of keys x bits of values,
    # where the cache dtype comes first and loses nothing.
    loss = profile.loss[..., None, None].astype(np.float64)
    pad = ((0, 0), (0, 0), (0, 0), (0, 0), (1, 0))
    keys, values = (np.pad(profile.codec_loss(kind, profile.tokens), pad) for kind in ("key", "value"))
    loss = loss + keys[:, :, :, None, :, :, None] + values[:, :, :, None, :, None, :]
    k_bits, v_bits = (np.array([CACHE_BITS, *known.tolist()]) for known in (profile.key_bits, profile.value_bits))
    k_size, v_size = (np.array([_element_bits(int(id)) for id in known]) for known in (k_bits, v_bits))
    # As a share of the head's full cache, [C, 1 + Qk, 1 + Qv]. Scales and anchors hardly count.
    size = profile.tokens[:, None, None] * (k_size[:, None] + v_size) / (2.0 * CACHE_BITS * profile.window)
    mean = loss.mean(0)
    # argmin of loss + price x size: the Lagrangian of a memory target, so these are plans that solving would propose.
    heads, prices = mean.shape[:2], np.full(mean.shape[:2], price)
    if number % 2:
        # One price cuts all heads alike; with two, plans differ in more than how much they cut.
        prices[np.random.default_rng((seed, number)).random(heads) < 0.5] /= LESS
    best = (mean + prices[..., None, None, None, None] * size[None]).reshape(*heads, -1).argmin(-1)
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
