"""The third stage: other episodes, with quotes, give losses under the fitted scorer and quantiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcompile.kernels import followable
from kvcompile.kernels.codecs import profiled
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, over_context
from kvcompile.profile.eviction import SHARES, entries
from kvcompile.profile.fisher import BACKWARD_TICKS, gradients, head_gradient
from kvcompile.profile.fit import Fit
from kvcompile.profile.fitted import STORED, points
from kvcompile.profile.given import given, lend
from kvcompile.profile.held import Held
from kvcompile.profile.job import Additions, Item
from kvcompile.profile.lanes import Reading, readings
from kvcompile.profile.layer_losses import layer_losses
from kvcompile.profile.layerwise import after, left_in_last, read_layer, through
from kvcompile.profile.linear import tensors_of
from kvcompile.profile.losses import Table, asked_of
from kvcompile.profile.quantised import Errors
from kvcompile.profile.references import LayerReferences
from kvcompile.profile.resume import Sums
from kvcompile.profile.rotation import of_layer
from kvcompile.profile.setting import Setting, asked_tokens, tokens_of
from kvcompile.profile.structure import (
    attends,
    head,
    heads,
    last_own,
    layers,
    place_of,
    planned_layers,
    source_layer,
)  # fmt: skip
from kvcompile.profile.utility import scores
from kvcompile.runtime.parts import planned, sources


class Curves:
    """Sums over the episodes to measure on: losses by family, and in `weight` [F] how many episodes each sums over.

    On the way up every layer's keys, values and scores are held for the way down, and the states of what is asked.
    Episodes in `kept` leave there what running plans on them takes: keys, values and scores, and the first and last
    states.
    """

    def __init__(self, setting: Setting, fit: Fit, kept: frozenset[int] = frozenset()) -> None:
        self.setting, self.fit, self.kept = setting, fit, kept
        self.readings = readings("text", setting.material.measure)
        self._known: tuple[int, tuple[Errors, Errors]] | None = None

    def fresh(self) -> Sums:
        _, num_kv_heads = heads(self.setting.model)
        each = (len(self.setting.families), len(planned_layers(self.setting.model)), num_kv_heads)
        kept, keys, values = points(self.setting.budgets), len(profiled("k")), len(profiled("v"))
        return {
            "weight": np.zeros(each[0]),
            "loss": np.zeros((*each, len(SHARES), len(self.setting.budgets))),
            "fitted_loss": np.zeros((*each, len(kept))),
            "key_loss": np.zeros((*each, keys)),
            "value_loss": np.zeros((*each, values)),
            "kept_key_loss": np.zeros((*each, len(kept[:STORED]), keys)),
            "kept_value_loss": np.zeros((*each, len(kept[:STORED]), values)),
        }

    def at(self, layer: int) -> Iterator[Item]:
        """The items of one layer on the way up, an episode each."""
        part = layers(self.setting.model)[layer]
        for number, reading in enumerate(self.readings):
            yield Item(partial(self._read, layer, number), part, tokens_of(reading.episode), number)

    def gradients(self) -> Iterator[Item]:
        """Items that turn around at the head."""
        return (Item(partial(self._turn, i), head(self.setting.model), owner=i) for i in range(len(self.readings)))

    def back(self, layer: int) -> Iterator[Item]:
        """The items of one layer on the way down."""
        part = layers(self.setting.model)[layer]
        for number, reading in enumerate(self.readings):
            work = BACKWARD_TICKS * asked_tokens(reading.episode)
            yield Item(partial(self._measure, layer, number), part, work, number)

    @torch.no_grad()
    def _read(self, layer: int, number: int, sums: Sums, held: Held) -> None:
        cache = self.readings[number].cache(source_layer(self.setting.model, layer))
        if layer > last_own(self.setting.model):
            left = held.get(cache)
        else:
            left = self._left(layer, number, sums, held)
            held.put(cache, **left)
        self._follow(layer, number, left, held)

    def _follow(self, layer: int, number: int, left: dict[str, Tensor], held: Held) -> None:
        """Have what is asked go through a layer, after a context that has `left` this for it."""
        setting, reading = self.setting, self.readings[number]
        part, asked = layers(setting.model)[layer], reading.asked
        context = _context(left)
        arguments, attend = given(setting, asked, layer, held), over_context(context, reading.packed)

        def attending(call: Attention) -> Tensor:
            output = attend(call)
            if followable(call.query, context.keys[0], call.window or 0, call.softmax):
                held.spare(reading.attended(layer), output)  # needed once more on the way down
            return output

        with after(setting.model, part, reading.packed, left):
            later = through(part, held.one(asked.at(layer)), arguments, attending)
        lend(setting, asked, layer, arguments, held)
        held.put(asked.at(layer + 1), hidden=later)

    def _left(self, layer: int, number: int, sums: Sums, held: Held) -> dict[str, Tensor]:
        """What a context leaves in a layer; its states before the next layer are held."""
        model, before = self.setting.model, self.readings[number].context
        part, states = layers(model)[layer], held.one(before.at(layer))
        arguments = given(self.setting, before, layer, held)
        if (last := layer == last_own(model)) and attends(part):
            context = left_in_last(part, states, arguments)
        else:
            states, context = read_layer(model, part, states, arguments)
            if not last:
                held.put(before.at(layer + 1), hidden=states)
        held.drop(before.at(layer))
        left = tensors_of(context.states, part)
        if attends(part):
            left = {"key": context.keys[0], "value": context.values[0]}
        if planned(part):
            scorer, _ = self.fit.of_layer(sums, layer)
            left |= {"score": scores(scorer, 0, context.hidden[0]), "references": context.references[0]}
        return left

    def _errors(self, layer: int, sums: Sums, device: torch.device) -> tuple[Errors, Errors]:
        """What codecs do to the keys and to the values of a layer; those of the layer at hand are made once."""
        if self._known is None or self._known[0] != layer:
            _, quantiser = self.fit.of_layer(sums, layer)
            self._known = layer, (Errors(quantiser, "key", device), Errors(quantiser, "value", device))
        return self._known[1]

    def _from_later(self, layer: int, reading: Reading, held: Held) -> Sequence[Tensor]:
        """The gradients at the keys and values that a layer attends to of all later ones that attend to them; none
        where there is no such layer."""
        own = sources(self.setting.model)
        if own[layer] not in own[layer + 1 :]:
            return ()
        name = reading.lent_gradient(own.index(own[layer], layer + 1))
        found = held.get(name)
        held.drop(name)
        return found["key"], found["value"]

    def _turn(self, number: int, _: Sums, held: Held) -> None:
        model, reading, top = self.setting.model, self.readings[number], len(layers(self.setting.model))
        final = held.one(reading.asked.at(top))[0]
        # What the model says inside a question is not judged; how its rows serve the answer's still is.
        rows = torch.cat([torch.arange(block.judged, block.stop) for block in reading.packed.blocks]).to(final.device)
        gradient = torch.zeros_like(final)
        gradient[rows] = head_gradient(model, final[rows], (self.setting.seed, number))
        held.put(reading.gradient(top), gradient=gradient[None])
        if number not in self.kept:
            held.drop(reading.asked.at(top))

    def _measure(self, layer: int, number: int, sums: Sums, held: Held) -> Additions:
        setting, sink, reading = self.setting, self.setting.sink, self.readings[number]
        part, asked, packed = layers(setting.model)[layer], reading.asked, reading.packed
        # Losses of a head are those in all layers that attend to it.
        source, own = source_layer(setting.model, layer), layers(setting.model)
        cache, place = held.get(reading.cache(source)), place_of(setting.model, source)
        context = _context(cache)
        # Budgets are shares of the window: a shorter context is cut in proportion.
        budgets = setting.budgets * (len(reading.episode.context) / setting.window)
        budgets = np.maximum(budgets, sink + 1).round().astype(np.int32)
        found: dict[str, Table] = {}

        def visit(call: Attention, upstream: Tensor) -> None:
            if not planned(own[source]) or (call.window is not None and call.window < len(context)):
                return  # a sliding layer keeps its own window, so there is nothing to choose
            rotary = of_layer(setting.rotary, place)
            references = LayerReferences.of(call, cache["references"], len(context), rotary)
            keys = context.keys[0]
            looks = [references.of_head(h, keys, context.values[0]) for h in range(len(keys))]
            score = torch.stack([look.scores(one) for look, one in zip(looks, cache["score"], strict=True)])
            entry = entries(score, budgets, sink)
            rows, at = asked_of(call, upstream, packed), points(setting.budgets)
            errors = self._errors(source, sums, keys.device)
            found.update(layer_losses(call, rows, context, packed, looks, entry, len(budgets), at, errors))

        at_lent = self._from_later(layer, reading, held)
        with after(setting.model, part, packed, cache):
            gradient, lent = gradients(
                part, held.one(asked.at(layer)), given(setting, asked, layer, held),
                held.one(reading.gradient(layer + 1)), visit,
                over_context(context, packed, known=held.take(reading.attended(layer))),
                at_lent if source == layer else (),
            )  # fmt: skip
        held.put(reading.gradient(layer), gradient=gradient)
        held.drop(reading.gradient(layer + 1))
        if lent:
            key, value = [a + b for a, b in zip(lent, at_lent, strict=True)] if at_lent else lent
            held.put(reading.lent_gradient(layer), key=key, value=value)
        elif at_lent:
            held.drop(asked.lent(layer))
        if number not in self.kept and source == layer:
            held.drop(reading.cache(layer))
        if number not in self.kept or layer > 0:
            held.drop(asked.at(layer))
        text, questions = setting.rows(reading.episode)

        additions: list[tuple[str, Any, Any]] = []
        for name, tables in found.items():
            additions += [
                (name, (text, place), (tables["continuation"] + tables["quote"]) / 2),
                (name, (questions, place), tables["question"]),
            ]
        if layer == 0:
            additions.append(("weight", [text, questions], 1))
        return additions


def _context(left: dict[str, Tensor]) -> Context:
    """What a context has left in one layer of attention; of no layer where it is of linear attention."""
    return Context([], [left["key"]], [left["value"]]) if "key" in left else Context([], [], [])
