"""What the first stage's sums give: a layer's scorer and quantiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import Quantiser, Scorer
from kvcompile.profile.held import Held
from kvcompile.profile.moments import MOMENTS, Moments, fit_quantiser, keys_of
from kvcompile.profile.ranks import Ranks
from kvcompile.profile.resume import Sums
from kvcompile.profile.structure import head_dim, heads, planned_layers
from kvcompile.profile.utility import fit_scorer
from kvcompile.quantiser import Positions
from kvcompile.stages import KeyMoments, Moment, Rotary

KEY_MOMENTS = ("plain", "attended", "query")
"""The moments of `KeyMoments`."""

Numbers = dict[str, NDArray[Any]]
"""Normal equations and moments by name: `squares` and `products` of `normal_sums`, and the fields of `Moments`."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """The scorer; the quantiser, for keys at the positions of the window; and the moments of keys that it is made
    from."""

    scorer: Scorer
    quantiser: Quantiser
    keys: KeyMoments


def fresh_tables(model: Any) -> Sums:
    """What `fit_layer` fills, of all layers."""
    num_layers, (_, num_kv_heads), size = len(planned_layers(model)), heads(model), head_dim(model)
    each, inputs = (num_layers, num_kv_heads), model.config.get_text_config().hidden_size
    tables: Sums = {
        "scorer.weight": np.zeros((*each, inputs), np.float16),
        "scorer.bias": np.zeros(each, np.float32),
    }
    for kind in ("key", "value"):
        tables[f"quantiser.{kind}_transform"] = np.zeros((*each, size, size), np.float16)
        tables[f"quantiser.{kind}_mean"] = np.zeros((*each, size), np.float16)
    for kind in KEY_MOMENTS:
        tables[f"{kind}.mean"] = np.zeros((*each, size), np.float32)
        tables[f"{kind}.factor"] = np.zeros((*each, size * (size + 1) // 2), np.float16)
    return tables


def fit_layer(found: Numbers, rotary: Rotary, window: int) -> Numbers:
    """The tables of one layer from its sums over all episodes; `rotary` is a table of the layer."""
    scorer = fit_scorer(found["squares"][None], found["products"][None])
    of_one = [Moments(*(found[name] for name in MOMENTS))]
    keys = keys_of(of_one, rotary)
    # Losses are measured on contexts of the window, so the keys' transform is first made for its positions.
    quantiser = fit_quantiser(of_one, keys, (Positions(0, window),))
    tables = {
        **{f"scorer.{name}": value for name, value in vars(scorer).items()},
        **{f"quantiser.{name}": value for name, value in vars(quantiser).items()},
        **{f"{kind}.{name}": value for kind in KEY_MOMENTS for name, value in vars(getattr(keys, kind)).items()},
    }
    return {name: table[0] for name, table in tables.items()}


def scorer_of(sums: Sums, which: slice) -> Scorer:
    """The scorer of some layers."""
    return Scorer(sums["scorer.weight"][which], sums["scorer.bias"][which])


def quantiser_of(sums: Sums, which: slice) -> Quantiser:
    """The quantiser of some layers."""
    names = [f"{kind}_{part}" for kind in ("key", "value") for part in ("transform", "mean")]
    return Quantiser(**{name: sums[f"quantiser.{name}"][which] for name in names})


def fitted(sums: Sums, rotary: Rotary) -> Fitted:
    """All that was fitted."""
    every = slice(None)
    kinds = {k: Moment(sums[f"{k}.mean"], sums[f"{k}.factor"]) for k in KEY_MOMENTS}
    return Fitted(scorer_of(sums, every), quantiser_of(sums, every), KeyMoments(**kinds, rotary=rotary))


class EpisodeSums:
    """Normal equations and moments of one layer, over `count` episodes.

    They are held while episodes add to them, and no longer: over all layers they would take more memory than a large
    model's layer.
    """

    def __init__(self, ranks: Ranks, count: int) -> None:
        self._ranks, self._count = ranks, count

    def add(self, layer: int, number: int, found: Numbers, held: Held) -> None:
        """Those of episode `number`."""
        if number > 0 and self._ranks.count == 1:
            # Alone, there is no need to hold every episode's numbers until all are there.
            found = _added(held.get(_name(layer, number - 1)), found)
            held.drop(_name(layer, number - 1))
        held.put(_name(layer, number), **{name: torch.from_numpy(np.asarray(value)) for name, value in found.items()})

    def total(self, layer: int, held: Held) -> Numbers:
        """Over all episodes, added in their order wherever they are."""
        ranks, total, last = self._ranks, Numbers(), self._count - 1
        for number in range(last if ranks.count == 1 else 0, last + 1):
            name = _name(layer, number)
            own = None
            if ranks.owns(number):
                own = {key: tensor.cpu().numpy() for key, tensor in held.get(name).items()}
                held.drop(name)
            found: Numbers = ranks.of(number, own)
            total = {key: total[key] + value for key, value in found.items()} if total else found
        return total


def _added(earlier: Mapping[str, Tensor], found: Numbers) -> Numbers:
    """Sums of both, in the new numbers' place: the earlier ones are to be found again should this be repeated."""
    return {name: np.add(earlier[name].cpu().numpy(), value, out=value) for name, value in found.items()}


def _name(layer: int, number: int) -> str:
    return f"fit@{layer}.{number}"
