"""KVzip (arXiv 2505.23416): of every prompt the keys and values that repeating it needs most, by a second pass over it.

An upper reference and no cache: masks hide what would be evicted, all of it stays in memory, and reading a prompt takes
two to three times as long. What comes after the context is kept whole, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import (
    DTYPE_BITS,
    Artifact,
    TargetError,
    full_bytes,
    slot_bytes,
    state_bytes,
    states_name,
    token_limits,
)
from kvcompile.calibration import FollowUp
from kvcompile.evaluation.participant import Answer, Question
from kvcompile.evaluation.repeating import repeats
from kvcompile.problem import parse_memory, resolve_target
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, follow, over_context, pack, read_context
from kvcompile.profile.structure import logits
from kvcompile.profile.utility import utilities
from kvcompile.runtime import ReadPrompt
from kvcompile.stages import DEFAULT_SINK

CHUNK = 2048
"""Tokens of a context that are repeated at once, and whose keys alone compete for attention meanwhile."""
READ, SCORES = "context in the cache dtype", "utility to a repetition"
"""Names of what `Question.found` has of a context: a `Context`, and the `scores` of its tokens."""


@dataclass(frozen=True)
class KVzip:
    """Keeps `pairs` keys with their values, in elements of `dtype`, of all layers but `sliding` ones, which keep their
    window. Of the `full` cache's pairs, `fixed` are in the sliding layers."""

    method: str
    budget: str
    pairs: int
    full: int
    fixed: int
    sliding: tuple[bool, ...]
    dtype: str

    @contextmanager
    def read(self, model: Any, context: NDArray[np.int64]) -> Iterator[Masked]:
        yield self._masked(model, np.asarray(context), None, {})

    def answer(self, model: Any, questions: Sequence[Question], ends: set[int]) -> list[Answer]:
        """One by one; what a second pass says of a context holds for every budget, and is found once."""
        said = []
        for one in questions:
            held = self._masked(model, one.context, one.before, one.found)
            tokens = held.answer(one.ids, one.new_tokens, ends)
            said.append(Answer(tokens, held.share(len(one.ids) + len(tokens))))
        return said

    def _masked(self, model: Any, ids: NDArray[np.int64], before: ReadPrompt | None, found: dict[str, Any]) -> Masked:
        """A context [n] and what this budget keeps of it; `found` and `before` as in `Question`."""
        if READ not in found:
            found[READ] = self._read(model, ids, before)
        context: Context = found[READ]
        heads = sum(len(key) for key, sliding in zip(context.keys, self.sliding, strict=True) if not sliding)
        pairs = min(self.pairs, heads * len(ids))
        kept: list[Tensor | None] = [None] * len(context.keys)
        if pairs < heads * len(ids):
            if SCORES not in found:
                found[SCORES] = scores(model, context, repeats(model, ids, CHUNK))
            kept = most_useful(found[SCORES], self.sliding, pairs)
        return Masked(model, context, kept, (pairs + self.fixed) / self.full, heads / self.full)

    def _read(self, model: Any, ids: NDArray[np.int64], before: ReadPrompt | None) -> Context:
        """What a context leaves, its keys and values rounded to `dtype`."""
        if before is None:
            read = read_context(model, ids)
        else:
            read = Context([], [key[0] for key in before.keys], [value[0] for value in before.values])
        stored = getattr(torch, self.dtype)
        keys, values = ([part.to(stored).to(part.dtype) for part in side] for side in (read.keys, read.values))
        return Context([], keys, values, read.states)


@dataclass(frozen=True)
class Masked:
    """A context of which each KV head sees `kept`, by layer bool [H, n] or None for all: `part` of the full cache.
    Every token that comes after it takes `each` of the full cache more."""

    model: Any
    context: Context
    kept: list[Tensor | None]
    part: float
    each: float

    def share(self, tokens: int) -> float:
        return self.part + self.each * tokens

    @torch.inference_mode()
    def ask(self, one: FollowUp) -> Tensor:
        packed = pack(len(self.context), [one])
        trace = follow(self.model, self.context, packed, over_context(self.context, packed, self.kept))
        return logits(self.model, trace.final[one.first : -1]).float().log_softmax(-1)

    @torch.inference_mode()
    def answer(self, question: NDArray[np.int64], new_tokens: int, ends: set[int]) -> Tensor:
        """Greedy tokens i64 [n] after a question [m]: until one of `ends`, itself included, at most `new_tokens`."""
        held, fed, said = self, question, list[int]()
        while len(said) < new_tokens and not (said and said[-1] in ends):
            fed, held = held._next(fed)
            said.append(int(fed[-1]))
        return torch.tensor(said)

    def _next(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], Masked]:
        """What to read next after ids i64 [m], its last token the new one, and what is held then: the new token alone,
        with the keys and values of `ids` held; or, for a model with states of linear attention, which are the
        context's, all of `ids` once more and the new token, with nothing more held."""
        packed = pack(len(self.context), [FollowUp("question", len(ids) - 1, ids)])
        attend, grown = over_context(self.context, packed, self.kept), Context([], [], [])

        def keep(call: Attention) -> Tensor:
            grown.keys.append(torch.cat([self.context.keys[call.layer], call.key], 1))
            grown.values.append(torch.cat([self.context.values[call.layer], call.value], 1))
            return attend(call)

        trace = follow(self.model, self.context, packed, keep)
        new = logits(self.model, trace.final[-1:]).argmax(-1).cpu().numpy()
        if self.context.states is not None:
            return np.concatenate([ids, new]), self
        kept = [None if seen is None else F.pad(seen, (0, len(ids)), value=True) for seen in self.kept]
        return new, replace(self, context=grown, kept=kept)


def kvzip(artifact: Artifact, method: str, budget: str, context: int) -> KVzip:
    """KVzip at a budget for the artifact's model.

    Raises:
        TargetError: a budget that does not hold the sinks and the windows of sliding layers, or a model with windows
            that a plan leaves alone.
    """
    model, dtype = artifact.model, artifact.target.dtype
    target = resolve_target(model, parse_memory(budget), context, 1, "auto", dtype)
    pair = slot_bytes("full", model.head_dim, DTYPE_BITS[dtype], DTYPE_BITS[dtype])
    limits = token_limits(model.windows, context)
    sliding = tuple(limit < context for limit in limits)
    states = state_bytes(model, dtype)  # of linear attention, which are kept whatever the budget
    if states and not model.states[1]:
        raise TargetError(f"{method} does not know the {states_name(model)} of a {model.architecture!r} model")
    full = (full_bytes(model, context, dtype) - states) // pair
    fixed = sum(limit for limit in limits if limit < context) * model.num_kv_heads
    pairs = min((target.bytes - states) // pair, full) - fixed
    if pairs < (least := min(DEFAULT_SINK, context) * model.num_kv_heads * sliding.count(False)):
        raise TargetError(
            f"{method} cannot keep to {budget}: the first {DEFAULT_SINK} tokens of every head, and the windows of "
            f"sliding layers, take {(least + fixed) * pair} bytes"
        )
    return KVzip(method, budget, pairs, full, fixed, sliding, dtype)


def scores(model: Any, context: Context, chunks: list[tuple[slice, FollowUp]]) -> list[Tensor]:
    """The score of every token to every KV head, by layer f32 [H, n]: the largest attention that any row of the pass
    that repeats the token's chunk, and any query head of the group, pays to it. The softmax is over sinks, chunk and
    the repetition alone."""
    found = [key.new_zeros(key.shape[:2], dtype=torch.float32) for key in context.keys]
    for part, repeat in chunks:
        _score(model, context, part, repeat, found)
    return found


def _score(model: Any, context: Context, part: slice, repeat: FollowUp, found: list[Tensor]) -> None:
    sink = min(DEFAULT_SINK, part.start)
    competing = Context([], [torch.cat([key[:, :sink], key[:, part]], 1) for key in context.keys], [])
    packed = pack(len(context), [repeat])
    attend = over_context(context, packed)

    def watch(call: Attention) -> Tensor:
        if call.window is None:
            found[call.layer][:, part] = utilities(call, competing, packed)[:, sink:]
        else:  # whose mask goes by the places of all tokens
            found[call.layer][:, part] = utilities(call, context, packed)[:, part]
        return attend(call)

    follow(model, context, packed, watch)


def most_useful(score: list[Tensor], sliding: tuple[bool, ...], pairs: int) -> list[Tensor | None]:
    """Which tokens each KV head keeps, by layer bool [H, n], None for a sliding layer: the `pairs` of the highest
    score in all other layers together, the sinks before all."""
    open_layers = [layer for layer, fixed in enumerate(sliding) if not fixed]
    table = torch.stack([score[layer] for layer in open_layers])
    table[..., :DEFAULT_SINK] = torch.inf
    keep = torch.zeros(table.numel(), dtype=torch.bool, device=table.device)
    keep[table.flatten().topk(pairs).indices] = True
    kept: list[Tensor | None] = [None] * len(score)
    for layer, row in zip(open_layers, keep.view(table.shape), strict=True):
        kept[layer] = row
    return kept
