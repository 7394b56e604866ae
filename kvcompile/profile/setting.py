"""What is profiled, and on what: the values that all stages of measuring share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcompile.effort import THOROUGH
from kvcompile.profile.calls import Calls
from kvcompile.profile.context import FollowUp
from kvcompile.profile.ranks import Ranks
from kvcompile.stages import RETRIEVAL, Rotary


class Episode(Protocol):
    """A context and what comes after it; `kvcompile.calibration.episodes` describes them."""

    @property
    def family(self) -> str: ...
    @property
    def context(self) -> NDArray[np.int64]: ...
    @property
    def follow_ups(self) -> Sequence[FollowUp]: ...
    @property
    def replayed(self) -> tuple[int, int]: ...


class Probe(Protocol):
    """A question about a text: i64 token ids, and the half-open ranges of `prompt_ids` that hold what it asks for."""

    @property
    def prompt_ids(self) -> NDArray[np.int64]: ...
    @property
    def answer_ids(self) -> NDArray[np.int64]: ...
    @property
    def needles(self) -> tuple[tuple[int, int], ...]: ...


@dataclass(frozen=True)
class Material:
    """What to profile on: episodes with a replay, to fit on; others to measure on; retrieval probes; and how many whole
    plans to run."""

    fit: Sequence[Episode]
    measure: Sequence[Episode]
    probes: Sequence[Probe]
    checks: int = THOROUGH.checks


@dataclass(frozen=True, eq=False)
class Setting:
    """A model and what it is profiled on. `budgets` i32 [C]: the tokens whose losses are measured, ascending to the
    longest context; `rotary`: the rotary embedding in contexts of that length; `sink`: first tokens that are always
    kept; `calls`: what the model's layers are called with; `ranks`: the
    processes that share the work."""

    model: Any
    material: Material
    seed: int
    sink: int
    budgets: NDArray[np.int32]
    rotary: Rotary
    calls: Calls
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def window(self) -> int:
        """Tokens of the longest context that is measured."""
        return int(self.budgets[-1])

    @property
    def families(self) -> tuple[str, ...]:
        """Families of the losses: those of the texts in order of appearance, then that of the questions."""
        return (*dict.fromkeys(episode.family for episode in self.material.measure), RETRIEVAL)

    def rows(self, episode: Episode) -> tuple[int, int]:
        """Where in `families` an episode's text counts, and its questions."""
        return self.families.index(episode.family), len(self.families) - 1


def tokens_of(episode: Episode) -> int:
    """Tokens of the context and of all that comes after it."""
    return len(episode.context) + asked_tokens(episode)


def asked_tokens(episode: Episode) -> int:
    """Tokens of the follow-ups alone."""
    return sum(len(one.ids) for one in episode.follow_ups)
