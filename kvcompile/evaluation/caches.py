"""Contexts in caches of transformers' interface: the full one, and those that artifacts make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import Artifact
from kvcompile.calibration import FollowUp
from kvcompile.runtime import ReadPrompt


@dataclass(frozen=True)
class Cached:
    """A context in a cache that has `part` of the full cache's bytes, whatever is asked of it. `generate` decodes: it
    takes a model, a cache, ids [1, m], `max_new_tokens` and `eos`."""

    model: Any
    cache: Any
    part: float
    generate: Callable[..., Tensor]

    def share(self, tokens: int) -> float:
        return self.part

    @torch.inference_mode()
    def ask(self, one: FollowUp) -> Tensor:
        keep, fork = len(one.ids) - one.first, copy.deepcopy(self.cache)
        logits = self.model(ids_of(self.model, one.ids), past_key_values=fork, logits_to_keep=keep).logits[0, :-1]
        said: Tensor = logits.float().log_softmax(-1)
        return said

    def answer(self, question: NDArray[np.int64], new_tokens: int, ends: set[int]) -> Tensor:
        # No fork: a cache of a long context once more would be the largest thing in memory.
        ids = ids_of(self.model, question)
        return self.generate(self.model, self.cache, ids, max_new_tokens=new_tokens, eos=ends)[0]


@dataclass(frozen=True)
class FullCache:
    """transformers' own cache, which the others are compared with."""

    method: str = "full cache"
    budget: str = ""

    @contextmanager
    def read(self, model: Any, context: NDArray[np.int64], before: ReadPrompt | None = None) -> Iterator[Cached]:
        from transformers import DynamicCache

        from kvcompile.runtime import generate_full

        if before is not None:
            yield Cached(model, before.full_cache(model), 1.0, generate_full)
            return
        cache: Any = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(ids_of(model, context), past_key_values=cache, logits_to_keep=1)
        yield Cached(model, cache, 1.0, generate_full)


@dataclass(frozen=True)
class Contender:
    """A plan under a name, at a budget as it was asked for ("" for the artifact itself)."""

    method: str
    budget: str
    artifact: Artifact

    @contextmanager
    def read(self, model: Any, context: NDArray[np.int64], before: ReadPrompt | None = None) -> Iterator[Cached]:
        from kvcompile.runtime import Decoder, attach, filled, generate, looks_at_queries

        with attach(model, self.artifact) as kv:
            if before is None or looks_at_queries(kv):
                cache = kv.new_cache()
                Decoder(model, cache).prefill(ids_of(model, context))
            else:
                cache = filled(kv, before)
            share = cache.nbytes * self.artifact.target.batch / self.artifact.bytes.full
            yield Cached(model, cache, share, generate)


def ids_of(model: Any, tokens: Any) -> Tensor:
    """Tokens [n] as the model takes them, [1, n]."""
    return torch.as_tensor(tokens, device=model.device)[None]
