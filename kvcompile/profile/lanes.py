"""Sequences on their way through the layers, and where their states are held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvcompile.profile.calls import embedded
from kvcompile.profile.context import Packed, pack
from kvcompile.profile.held import Held
from kvcompile.profile.job import Item
from kvcompile.profile.resume import Sums
from kvcompile.profile.setting import Episode, Setting
from kvcompile.profile.structure import embedding
from kvcompile.runtime.token_inputs import has_token_inputs


@dataclass(frozen=True)
class Lane:
    """One sequence: its tokens and their positions, i64 [n], and the number by which a process owns it."""

    name: str
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    owner: int

    def at(self, layer: int) -> str:
        """The name of its residual stream [1, n, d] before a layer; the last one is before the head."""
        return f"{self.name}@{layer}"

    @property
    def embedded(self) -> str:
        """The name of its residual stream before the first layer where that is needed later too."""
        return f"{self.name}.embedded"

    def lent(self, layer: int) -> str:
        """The name of its keys and values in a layer where later ones attend to them."""
        return f"{self.name}.lent@{layer}"


@dataclass(frozen=True)
class Reading:
    """An episode as two lanes: the context, and all that is asked after it; both belong to the owner of `number`."""

    name: str
    episode: Episode
    number: int

    @cached_property
    def context(self) -> Lane:
        ids = self.episode.context
        return Lane(f"{self.name}.context", ids, np.arange(len(ids)), self.number)

    @cached_property
    def packed(self) -> Packed:
        return pack(len(self.episode.context), self.episode.follow_ups)

    @cached_property
    def asked(self) -> Lane:
        return Lane(f"{self.name}.asked", self.packed.ids, self.packed.positions, self.number)

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        return self.context, self.asked

    def cache(self, layer: int) -> str:
        """The name of what the context leaves in a layer: its keys, values and scores."""
        return f"{self.name}.cache@{layer}"

    def attended(self, layer: int) -> str:
        """The name of the attention output of all that is asked in a layer."""
        return f"{self.name}.attended@{layer}"

    def lent_gradient(self, layer: int) -> str:
        """The name of the gradients at the keys and values that a layer attends to and an earlier one has, of it and of
        all later ones."""
        return f"{self.name}.lent-gradient@{layer}"

    def gradient(self, layer: int) -> str:
        """The name of the gradient [1, m, d] at the residual stream before a layer, over all that is asked."""
        return f"{self.name}.gradient@{layer}"


def readings(name: str, episodes: Sequence[Episode]) -> list[Reading]:
    """The episodes' lanes, named after their numbers."""
    return [Reading(f"{name}{number}", episode, number) for number, episode in enumerate(episodes)]


def opening(setting: Setting, lanes: Sequence[Lane]) -> Iterator[Item]:
    """Items that put every lane before the first layer."""

    def item(lane: Lane) -> Item:
        def run(_: Sums, held: Held) -> None:
            hidden = embedded(setting.model, lane.ids)
            held.put(lane.at(0), hidden=hidden)
            if has_token_inputs(setting.model):
                held.put(lane.embedded, hidden=hidden)

        return Item(run, embedding(setting.model), owner=lane.owner)

    return (item(lane) for lane in lanes)
