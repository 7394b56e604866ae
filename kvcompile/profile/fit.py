"""The first stage: episodes with a replay give what the scorer and the quantiser are made from, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcompile.artifacts import Quantiser, Scorer
from kvcompile.profile.attention import Attention, Handler, causal
from kvcompile.profile.context import Context, over_context
from kvcompile.profile.fitting import (
    EpisodeSums,
    Fitted,
    Numbers,
    fit_layer,
    fitted,
    fresh_tables,
    quantiser_of,
    scorer_of,
)  # fmt: skip
from kvcompile.profile.given import given, lend
from kvcompile.profile.held import Held
from kvcompile.profile.job import Additions, Item
from kvcompile.profile.lanes import Reading, readings
from kvcompile.profile.layerwise import after, as_far_as_attention, read_layer, through
from kvcompile.profile.linear import tensors_of
from kvcompile.profile.moments import moments
from kvcompile.profile.resume import Sums
from kvcompile.profile.rotation import of_layer
from kvcompile.profile.scores import watching
from kvcompile.profile.setting import Setting, asked_tokens, tokens_of
from kvcompile.profile.structure import attends, heads, last_own, layers, place_of, planned_layers
from kvcompile.profile.utility import normal_sums, utilities
from kvcompile.runtime.parts import planned, sources


class Fit:
    """The scorer and the quantiser, one layer's made as soon as all episodes to fit on have come through it; and sums
    of the cosines of BaKlaVa and SqueezeAttention."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.readings = readings("fit", setting.material.fit)
        self._fitted: Fitted | None = None
        self._sums = EpisodeSums(setting.ranks, len(self.readings))
        own = layers(setting.model)
        self._sources = sources(setting.model)
        self._top = max(i for i, source in enumerate(self._sources) if planned(own[source]))
        """The last layer that is of interest: of those that a plan is for, or that attend to their keys and values."""

    def fresh(self) -> Sums:
        num_layers, (num_heads, _) = len(planned_layers(self.setting.model)), heads(self.setting.model)
        cosines = {"value_cosine": np.zeros((num_layers, num_heads)), "residual_cosine": np.zeros(num_layers)}
        return {**fresh_tables(self.setting.model), **cosines}

    def at(self, layer: int) -> Iterator[Item]:
        """The items of one layer: an episode each, then what the layer's sums give."""
        if layer > self._top:
            return
        part, source = layers(self.setting.model)[layer], self._sources[layer]
        step = self._follow if source != layer else self._read if planned(part) else self._pass
        for number, reading in enumerate(self.readings):
            work = tokens_of(reading.episode) if source == layer else asked_tokens(reading.episode)
            yield Item(partial(step, layer, number), part, work, number)
        if planned(layers(self.setting.model)[source]) and self._is_last(layer):
            yield Item(partial(self._fit, source), part, owner=None)

    def _is_last(self, layer: int) -> bool:
        """Whether no later layer attends to the same keys and values."""
        return self._sources[layer] not in self._sources[layer + 1 :]

    @torch.no_grad()
    def _pass(self, layer: int, number: int, sums: Sums, held: Held) -> None:
        """Through a layer that a plan is not for."""
        model, setting, reading = self.setting.model, self.setting, self.readings[number]
        part, before, asked = layers(model)[layer], reading.context, reading.asked
        states, context = read_layer(model, part, held.one(before.at(layer)), given(setting, before, layer, held))
        attend = over_context(context, reading.packed) if attends(part) else causal
        arguments = given(setting, asked, layer, held)
        with after(model, part, reading.packed, tensors_of(context.states, part)):
            later = through(part, held.one(asked.at(layer)), arguments, attend)
        if not self._is_last(layer):
            held.put(reading.cache(layer), key=context.keys[0], value=context.values[0])
        self._hand_on(layer, number, states, later, arguments, held)

    def _hand_on(
        self, layer: int, number: int, before: Tensor | None, asked: Tensor | None, arguments: Any, held: Held
    ) -> None:
        """Hold what a layer has made of a context (None: nobody needs it) and of what is asked after it."""
        model, reading = self.setting.model, self.readings[number]
        if before is not None and layer < last_own(model):
            held.put(reading.context.at(layer + 1), hidden=before)
        if asked is not None:
            held.put(reading.asked.at(layer + 1), hidden=asked)
        lend(self.setting, reading.asked, layer, arguments, held)
        held.drop(reading.context.at(layer), reading.asked.at(layer))

    @torch.no_grad()
    def _read(self, layer: int, number: int, sums: Sums, held: Held) -> Additions:
        model, setting, reading = self.setting.model, self.setting, self.readings[number]
        packed = reading.packed
        part, alone = layers(model)[layer], self._is_last(layer)
        before, later, place = reading.context, reading.asked, place_of(model, layer)
        with watching(part, heads(model)[0]) as cosines:
            states, context = read_layer(
                model, part, held.one(before.at(layer)), given(setting, before, layer, held),
                cosines.attending(causal),
            )  # fmt: skip
        found = Numbers()

        def watch(call: Attention) -> None:
            utility = utilities(call, context, packed)
            if alone:
                found.update(self._normal(number, context.hidden[0], utility))
            else:
                left = {"key": context.keys[0], "value": context.values[0], "hidden": context.hidden[0]}
                held.put(reading.cache(layer), **left)
                held.put(_utility(reading, layer), utility=utility)
            found.update(self._moments(layer, number, call, context))

        arguments = given(setting, later, layer, held)
        asked = self._watched(layer, held.one(later.at(layer)), arguments, watch, over_context(context, packed))
        self._sums.add(layer, number, found, held)
        self._hand_on(layer, number, states, asked, arguments, held)
        return [("value_cosine", place, cosines.value), ("residual_cosine", place, cosines.residual)]

    @torch.no_grad()
    def _follow(self, layer: int, number: int, sums: Sums, held: Held) -> None:
        """What is asked through a layer that attends to the keys and values of an earlier one: what it makes of these
        counts there. A context need not go through it, as nothing that is stored comes of that."""
        reading, source = self.readings[number], self._sources[layer]
        left, found = held.get(reading.cache(source)), Numbers()
        context = Context([], [left["key"]], [left["value"]])
        before = layer - 1 - self._sources[:layer][::-1].index(source)

        def watch(call: Attention) -> None:
            if "hidden" not in left:
                return  # a sliding layer that a plan is not for
            utility = torch.maximum(held.one(_utility(reading, before)), utilities(call, context, reading.packed))
            held.drop(_utility(reading, before))
            if self._is_last(layer):
                found.update(self._normal(number, left["hidden"], utility))
            else:
                held.put(_utility(reading, layer), utility=utility)
            found.update(self._moments(layer, number, call, context))

        arguments = given(self.setting, reading.asked, layer, held)
        states, attend = held.one(reading.asked.at(layer)), over_context(context, reading.packed)
        asked = self._watched(layer, states, arguments, watch, attend)
        if found:
            self._sums.add(layer, number, found, held)
        if self._is_last(layer):
            held.drop(reading.cache(source), reading.asked.lent(source))
        self._hand_on(layer, number, None, asked, arguments, held)

    def _watched(
        self, layer: int, states: Tensor, arguments: Any, watch: Callable[[Attention], None], attend: Handler
    ) -> Tensor | None:
        """What is asked after a layer whose attention `watch` sees; None where nothing comes after it."""
        part = layers(self.setting.model)[layer]

        def attending(call: Attention) -> Tensor:
            watch(call)
            return attend(call)

        if layer < self._top:
            return through(part, states, arguments, attending)
        as_far_as_attention(part, states, arguments, watch)
        return None

    def _normal(self, number: int, hidden: Tensor, utility: Tensor) -> Numbers:
        """The scorer's normal equations of one episode in one layer."""
        replayed = self.readings[number].episode.replayed
        squares, products = normal_sums(hidden, utility, replayed, self.setting.sink)
        return {"squares": squares, "products": products}

    def _moments(self, layer: int, number: int, call: Attention, context: Context) -> Numbers:
        """What the quantiser is made from, of one episode in one layer."""
        projection = layers(self.setting.model)[layer].get_parameter("self_attn.o_proj.weight")
        rotary = of_layer(self.setting.rotary, place_of(self.setting.model, self._sources[layer]))
        return vars(moments(call, context, self.readings[number].packed, projection, rotary))

    def _fit(self, layer: int, sums: Sums, held: Held) -> Additions:
        place, found = place_of(self.setting.model, layer), Numbers()
        for one in [number for number, source in enumerate(self._sources) if source == layer]:
            for name, total in self._sums.total(one, held).items():
                found[name] = found[name] + total if name in found else total
        tables = fit_layer(found, of_layer(self.setting.rotary, place), self.setting.window)
        return [(name, place, table) for name, table in tables.items()]

    def of_layer(self, sums: Sums, layer: int) -> tuple[Scorer, Quantiser]:
        """The scorer and the quantiser of one layer of attention, as tables of one layer."""
        place = place_of(self.setting.model, layer)
        one = slice(place, place + 1)
        return scorer_of(sums, one), quantiser_of(sums, one)

    def result(self, sums: Sums) -> Fitted:
        """Those of all layers, once all are in the sums."""
        if self._fitted is None:
            self._fitted = fitted(sums, self.setting.rotary)
        return self._fitted


def _utility(reading: Reading, layer: int) -> str:
    """The name of the utilities to all layers up to this one that attend to the same keys and values."""
    return f"{reading.name}.utility@{layer}"
