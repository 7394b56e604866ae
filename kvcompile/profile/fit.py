"""The first stage: episodes with a replay give what the scorer and the quantiser are made from, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import Quantiser, Scorer
from kvcompile.profile.attention import Attention, causal
from kvcompile.profile.context import over_context
from kvcompile.profile.given import given
from kvcompile.profile.held import Held
from kvcompile.profile.job import Additions, Item
from kvcompile.profile.lanes import readings
from kvcompile.profile.layerwise import after, as_far_as_attention, read_layer, through
from kvcompile.profile.linear import tensors_of
from kvcompile.profile.moments import MOMENTS, Moments, fit_quantiser, keys_of, moments
from kvcompile.profile.resume import Sums
from kvcompile.profile.rotation import of_layer
from kvcompile.profile.scores import watching
from kvcompile.profile.setting import Setting, tokens_of
from kvcompile.profile.structure import attends, head_dim, heads, last_own, layers, place_of, planned_layers
from kvcompile.profile.utility import fit_scorer, normal_sums, utilities
from kvcompile.quantiser import Positions
from kvcompile.runtime.parts import planned
from kvcompile.stages import KeyMoments, Moment

KEY_MOMENTS = ("plain", "attended", "query")
"""The moments of `KeyMoments`."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """The scorer; the quantiser, for keys at the positions of the window; and the moments of keys that it is made
    from."""

    scorer: Scorer
    quantiser: Quantiser
    keys: KeyMoments


class Fit:
    """The scorer and the quantiser, one layer's made as soon as all episodes to fit on have come through it; and sums
    of the cosines of BaKlaVa and SqueezeAttention.

    A layer's normal equations and moments are held while its episodes add to them, and no longer: over all layers they
    would take more memory than a large model's layer.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.readings = readings("fit", setting.material.fit)
        self._fitted: Fitted | None = None

    def fresh(self) -> Sums:
        model = self.setting.model
        num_layers, (num_heads, num_kv_heads), size = len(planned_layers(model)), heads(model), head_dim(model)
        each, inputs = (num_layers, num_kv_heads), model.config.get_text_config().hidden_size
        fitted: Sums = {
            "scorer.weight": np.zeros((*each, inputs), np.float16),
            "scorer.bias": np.zeros(each, np.float32),
        }
        for kind in ("key", "value"):
            fitted[f"quantiser.{kind}_transform"] = np.zeros((*each, size, size), np.float16)
            fitted[f"quantiser.{kind}_mean"] = np.zeros((*each, size), np.float16)
        for kind in KEY_MOMENTS:
            fitted[f"{kind}.mean"] = np.zeros((*each, size), np.float32)
            fitted[f"{kind}.factor"] = np.zeros((*each, size * (size + 1) // 2), np.float16)
        return {
            **fitted,
            "value_cosine": np.zeros((num_layers, num_heads)),
            "residual_cosine": np.zeros(num_layers),
        }

    def at(self, layer: int) -> Iterator[Item]:
        """The items of one layer: an episode each, then what the layer's sums give."""
        part = layers(self.setting.model)[layer]
        if layer > last_own(self.setting.model):
            return  # no later layer has keys and values of its own
        step = self._read if planned(part) else self._pass
        for number, reading in enumerate(self.readings):
            yield Item(partial(step, layer, number), part, tokens_of(reading.episode), number)
        if planned(part):
            yield Item(partial(self._fit, layer), part, owner=None)

    @torch.no_grad()
    def _pass(self, layer: int, number: int, sums: Sums, held: Held) -> None:
        """Through a layer that a plan is not for."""
        model, setting, reading = self.setting.model, self.setting, self.readings[number]
        part, before, asked = layers(model)[layer], reading.context, reading.asked
        states, context = read_layer(model, part, held.one(before.at(layer)), given(setting, before, layer, held))
        attend = over_context(context, reading.packed) if attends(part) else causal
        with after(model, part, reading.packed, tensors_of(context.states, part)):
            later = through(part, held.one(asked.at(layer)), given(setting, asked, layer, held), attend)
        if layer < last_own(model):
            held.put(before.at(layer + 1), hidden=states)
            held.put(asked.at(layer + 1), hidden=later)
        held.drop(before.at(layer), asked.at(layer))

    @torch.no_grad()
    def _read(self, layer: int, number: int, sums: Sums, held: Held) -> Additions:
        model, setting, reading = self.setting.model, self.setting, self.readings[number]
        packed = reading.packed
        part, last = layers(model)[layer], layer == last_own(model)
        before, later, place = reading.context, reading.asked, place_of(model, layer)
        with watching(part, heads(model)[0]) as cosines:
            states, context = read_layer(
                model, part, held.one(before.at(layer)), given(setting, before, layer, held),
                cosines.attending(causal),
            )  # fmt: skip
        attend = over_context(context, packed)
        found: dict[str, NDArray[Any]] = {}

        def watch(call: Attention) -> None:
            utility = utilities(call, context, packed)
            found["squares"], found["products"] = normal_sums(
                context.hidden[0], utility, reading.episode.replayed, setting.sink
            )
            projection = part.get_parameter("self_attn.o_proj.weight")
            found.update(vars(moments(call, context, packed, projection, of_layer(setting.rotary, place))))

        def attending(call: Attention) -> Tensor:
            watch(call)
            return attend(call)

        asked = held.one(later.at(layer)), given(setting, later, layer, held)
        if last:
            as_far_as_attention(part, *asked, watch)
        else:
            held.put(later.at(layer + 1), hidden=through(part, *asked, attending))
        if number > 0 and setting.ranks.count == 1:
            # Alone, there is no need to hold every episode's numbers until all are there.
            found = _added(held.get(_sums(layer, number - 1)), found)
            held.drop(_sums(layer, number - 1))
        held.put(_sums(layer, number), **{name: torch.from_numpy(np.asarray(value)) for name, value in found.items()})
        if not last:
            held.put(before.at(layer + 1), hidden=states)
        held.drop(before.at(layer), later.at(layer))
        return [("value_cosine", place, cosines.value), ("residual_cosine", place, cosines.residual)]

    def _fit(self, layer: int, sums: Sums, held: Held) -> Additions:
        found, place = self._total(layer, held), place_of(self.setting.model, layer)
        scorer = fit_scorer(found["squares"][None], found["products"][None])
        of_one = [Moments(*(found[name] for name in MOMENTS))]
        keys = keys_of(of_one, of_layer(self.setting.rotary, place))
        # Losses are measured on contexts of the window, so the keys' transform is first made for its positions.
        quantiser = fit_quantiser(of_one, keys, (Positions(0, self.setting.window),))
        tables = {
            **{f"scorer.{name}": value for name, value in vars(scorer).items()},
            **{f"quantiser.{name}": value for name, value in vars(quantiser).items()},
            **{f"{kind}.{name}": value for kind in KEY_MOMENTS for name, value in vars(getattr(keys, kind)).items()},
        }
        return [(name, place, table[0]) for name, table in tables.items()]

    def _total(self, layer: int, held: Held) -> dict[str, NDArray[Any]]:
        """The sums of one layer over all episodes, added in their order wherever they are."""
        ranks, total, last = self.setting.ranks, dict[str, NDArray[Any]](), len(self.readings) - 1
        for number in range(last if ranks.count == 1 else 0, last + 1):
            name = _sums(layer, number)
            own = None
            if ranks.owns(number):
                own = {key: tensor.cpu().numpy() for key, tensor in held.get(name).items()}
                held.drop(name)
            found: dict[str, NDArray[Any]] = ranks.of(number, own)
            total = {key: total[key] + value for key, value in found.items()} if total else found
        return total

    def of_layer(self, sums: Sums, layer: int) -> tuple[Scorer, Quantiser]:
        """The scorer and the quantiser of one layer of attention, as tables of one layer."""
        place = place_of(self.setting.model, layer)
        one = slice(place, place + 1)
        return _scorer(sums, one), _quantiser(sums, one)

    def result(self, sums: Sums) -> Fitted:
        """Those of all layers, once all are in the sums."""
        if self._fitted is None:
            every = slice(None)
            kinds = {k: Moment(sums[f"{k}.mean"], sums[f"{k}.factor"]) for k in KEY_MOMENTS}
            keys = KeyMoments(**kinds, rotary=self.setting.rotary)
            self._fitted = Fitted(_scorer(sums, every), _quantiser(sums, every), keys)
        return self._fitted


def _added(earlier: dict[str, Tensor], found: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Sums of both, in the new numbers' place: the earlier ones are to be found again should this be repeated."""
    return {name: np.add(earlier[name].cpu().numpy(), value, out=value) for name, value in found.items()}


def _sums(layer: int, number: int) -> str:
    return f"fit@{layer}.{number}"


def _scorer(sums: Sums, which: slice) -> Scorer:
    return Scorer(sums["scorer.weight"][which], sums["scorer.bias"][which])


def _quantiser(sums: Sums, which: slice) -> Quantiser:
    names = [f"{kind}_{part}" for kind in ("key", "value") for part in ("transform", "mean")]
    return Quantiser(**{name: sums[f"quantiser.{name}"][which] for name in names})
