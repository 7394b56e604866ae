"""Contexts in caches of transformers' interface: the full one, and those that artifacts make."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompile.artifacts import Artifact
from kvcompile.calibration import Episode, FollowUp


@dataclass(frozen=True)
class Cached:
    """A context in a cache that has `part` of the full cache's bytes, whatever is asked of it."""

    model: Any
    cache: Any
    part: float

    def share(self, one: FollowUp) -> float:
        return self.part

    @torch.inference_mode()
    def ask(self, one: FollowUp) -> Tensor:
        keep, fork = len(one.ids) - one.first, copy.deepcopy(self.cache)
        logits = self.model(ids_of(self.model, one.ids), past_key_values=fork, logits_to_keep=keep).logits[0, :-1]
        said: Tensor = logits.float().log_softmax(-1)
        return said


@dataclass(frozen=True)
class FullCache:
    """transformers' own cache, which the others are compared with."""

    method: str = "full cache"
    budget: str = ""

    @contextmanager
    def read(self, model: Any, episode: Episode) -> Iterator[Cached]:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=model.config)
        fill(model, episode, cache)
        yield Cached(model, cache, 1.0)


@dataclass(frozen=True)
class Contender:
    """A plan under a name, at a budget as it was asked for ("" for the artifact itself)."""

    method: str
    budget: str
    artifact: Artifact

    @contextmanager
    def read(self, model: Any, episode: Episode) -> Iterator[Cached]:
        from kvcompile.runtime import attach

        with attach(model, self.artifact) as kv:
            cache = kv.new_cache()
            fill(model, episode, cache)
            yield Cached(model, cache, cache.nbytes * self.artifact.target.batch / self.artifact.bytes.full)


@torch.inference_mode()
def fill(model: Any, episode: Episode, cache: Any) -> None:
    """Read an episode's context into a cache."""
    model(ids_of(model, episode.context), past_key_values=cache, logits_to_keep=1)


def ids_of(model: Any, tokens: Any) -> Tensor:
    """Tokens [n] as the model takes them, [1, n]."""
    return torch.as_tensor(tokens, device=model.device)[None]
