"""Contexts in caches of transformers' interface: the full one, and those that artifacts make."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import Artifact
from kvcompile.calibration import FollowUp
from kvcompile.evaluation.participant import Answer, Question, until


@dataclass(frozen=True)
class Cached:
    """A context in a cache that has `part` of the full cache's bytes, whatever is asked of it."""

    model: Any
    cache: Any
    part: float

    def share(self, tokens: int) -> float:
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
    def read(self, model: Any, context: NDArray[np.int64]) -> Iterator[Cached]:
        yield Cached(model, _read(model, context), 1.0)

    def answer(self, model: Any, questions: Sequence[Question], ends: set[int]) -> list[Answer]:
        from kvcompile.runtime import generate_full

        said = []
        for one in questions:
            cache = _read(model, one.context) if one.before is None else one.before.full_cache(model)
            ids = ids_of(model, one.ids)
            tokens = generate_full(model, cache, ids, max_new_tokens=one.new_tokens, eos=ends)
            said.append(Answer(tokens[0], 1.0))
        return said


@dataclass(frozen=True)
class Contender:
    """A plan under a name, at a budget as it was asked for ("" for the artifact itself)."""

    method: str
    budget: str
    artifact: Artifact

    @contextmanager
    def read(self, model: Any, context: NDArray[np.int64]) -> Iterator[Cached]:
        from kvcompile.runtime import attach

        with attach(model, self.artifact) as kv:
            cache = _compressed(kv, context)
            yield Cached(model, cache, self._part(cache))

    def answer(self, model: Any, questions: Sequence[Question], ends: set[int]) -> list[Answer]:
        """Those whose contexts the model has read before are answered side by side, others one by one."""
        from kvcompile.runtime import attach, filled, generate, looks_at_queries

        before, said = [one.before for one in questions if one.before is not None], []
        with attach(model, self.artifact) as kv:
            together = len(before) == len(questions) and not looks_at_queries(kv)
            for part in [questions] if together else [[one] for one in questions]:
                cache = filled(kv, *before) if together else _compressed(kv, part[0].context)
                ids, real = _padded(model, [one.ids for one in part])
                most = max(one.new_tokens for one in part)
                tokens = generate(model, cache, ids, attention_mask=real, max_new_tokens=most, eos=ends).cpu()
                share = self._part(cache) / len(part)
                said += [Answer(until(row, one.new_tokens, ends), share) for row, one in zip(tokens, part, strict=True)]
        return said

    def _part(self, cache: Any) -> float:
        return float(cache.nbytes * self.artifact.target.batch / self.artifact.bytes.full)


def ids_of(model: Any, tokens: Any) -> Tensor:
    """Tokens [n] as the model takes them, [1, n]."""
    return torch.as_tensor(tokens, device=model.device)[None]


def _padded(model: Any, rows: Sequence[NDArray[np.int64]]) -> tuple[Tensor, Tensor | None]:
    """Token ids side by side, padded on the left, i64 [B, n], and where they are real; None where all are."""
    longest = max(map(len, rows))
    ids = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
    real = np.stack([np.arange(longest) >= longest - len(row) for row in rows])
    return torch.as_tensor(ids, device=model.device), None if real.all() else torch.as_tensor(real, device=model.device)


def _compressed(kv: Any, context: NDArray[np.int64]) -> Any:
    """A cache of a context that the attached model reads."""
    from kvcompile.runtime import Decoder

    cache = kv.new_cache()
    Decoder(kv.model, cache).prefill(ids_of(kv.model, context))
    return cache


@torch.inference_mode()
def _read(model: Any, context: NDArray[np.int64]) -> Any:
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    model(ids_of(model, context), past_key_values=cache, logits_to_keep=1)
    return cache
