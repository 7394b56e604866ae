"""Reference queries of a prompt: what stands for all that will be asked of it when its tokens are cut.

They are the prompt's own, evenly spread over it and turned on as if they came right after it: what the prompt asked of
itself is what a text that quotes it or goes on from it asks. Attention that they pay says, beside the compiled scorer,
which tokens to keep; and values are fitted to them (`runtime.fitted`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvcompile.artifacts import MASK_ELEMENTS, REFERENCES
from kvcompile.kernels import HeadClass, Softmax
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.rotation import Rotation

if TYPE_CHECKING:
    from kvcompile.runtime.layer_prompt import LayerPrompt

LEAST = 1e-7
"""Attention below this is no attention, here and where scorers are fitted: its logarithm would only say how little."""


@dataclass(frozen=True, eq=False)
class References:
    """Queries of prompts: `query` [B, num_heads, r, D], rotary embedding applied, and the `token` int64 [B, r] that
    each is of."""

    query: torch.Tensor
    token: torch.Tensor

    @classmethod
    def none_yet(cls, query: torch.Tensor, num_kv_heads: int, lengths: torch.Tensor) -> References:
        """Those of prompts of `lengths` int64 [B] tokens, of which none has been seen."""
        token = reference_tokens(lengths, query.shape[1] // num_kv_heads)
        return cls(query.new_zeros(*query.shape[:2], token.shape[1], query.shape[3]), token)

    def seen(self, query: torch.Tensor, first: torch.Tensor) -> References:
        """With those among the next T queries [B, num_heads, T, D], which begin with token `first` int64 [B]."""
        place = self.token - first[:, None]
        here = (place >= 0) & (place < query.shape[2])
        index = place.clamp(0, query.shape[2] - 1)[:, None, :, None]
        picked = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
        return replace(self, query=torch.where(here[:, None, :, None], picked, self.query))

    def after(self, rotation: Rotation, lengths: torch.Tensor) -> torch.Tensor:
        """As if they came one after the other right behind prompts of `lengths` int64 [B] tokens: f32 [B, num_heads, r,
        D]."""
        place = lengths[:, None] + torch.arange(self.token.shape[1], device=self.token.device)
        return rotation.turned(self.query, (place - self.token)[:, None])


def reference_tokens(lengths: torch.Tensor, group: int) -> torch.Tensor:
    """The tokens of prompts of `lengths` int64 [B] whose queries are references, where a KV head has a `group` of query
    heads: int64 [B, r]."""
    count = -(-REFERENCES // group)
    return (2 * torch.arange(count, device=lengths.device) + 1) * lengths[:, None] // (2 * count)


def uses_references(cls: HeadClass, count: int) -> bool:
    """Whether the heads of a class look at reference queries of prompts of so many tokens: their policy says so, and
    they evict."""
    return POLICIES[cls.policy].references and count > cls.capacity


@dataclass(frozen=True, eq=False)
class HeadReferences:
    """One KV head's reference queries of one prompt of n tokens: `query` f32 [group, r, D] after the prompt, of which
    those `real` bool [r] count (None: all), what multiplies their logits, and how these become weights."""

    query: torch.Tensor
    scaling: float
    softmax: Softmax
    real: torch.Tensor | None = None

    def __len__(self) -> int:
        """Rows, those that do not count included."""
        return self.query.shape[0] * self.query.shape[1]

    def weights(self, keys: torch.Tensor) -> Iterator[torch.Tensor]:
        """Weights f32 [group, T, n] of `keys` f32 [n, D], some of the queries at a time; 0 of those that do not
        count."""
        rows = max(1, MASK_ELEMENTS // (len(self.query) * len(keys)))
        for start in range(0, self.query.shape[1], rows):
            query = self.query[:, start : start + rows]
            weights = self.softmax.weights((query @ keys.mT * self.scaling)[None], None)[0]
            yield weights if self.real is None else weights.mul_(self.real[start : start + rows, None])

    def attended(self, keys: torch.Tensor, values: torch.Tensor) -> Attended:
        """Over all of a prompt's `keys` and `values` [n, D]."""
        keys, values, outputs = keys.float(), values.float(), []
        square = torch.zeros(len(keys), dtype=torch.float32, device=keys.device)
        for weights in self.weights(keys):
            outputs.append(weights @ values)
            square += weights.square_().sum((0, 1))
        return Attended((square / len(self)).sqrt(), torch.cat(outputs, 1))


@dataclass(frozen=True, eq=False)
class Attended:
    """Attention of a KV head's reference queries over all of a prompt: f32 [n] the root mean square of their
    `weights`, and their `output` f32 [group, r, D]."""

    weights: torch.Tensor
    output: torch.Tensor

    def scores(self, score: torch.Tensor) -> torch.Tensor:
        """By which the head is to choose among tokens, f32 [n]: the mean of the compiled scorer's `score` f32 [n] and
        of the logarithm of the weights; with the mean that `score` has, as later tokens have nothing else. Rounded as a
        cache holds it."""
        weight = self.weights.clamp_min(LEAST).log()
        return ((score + weight + (score - weight).mean()) / 2).half().float()


@dataclass(frozen=True, eq=False)
class ReferredHead:
    """The `references` of prompt `b`, in the columns `own`, for KV head number `head`, at `place` in class number
    `which`, and what they have `attended` to."""

    which: int
    place: int
    head: int
    b: int
    own: slice
    references: HeadReferences
    attended: Attended


def referred_heads(prompt: LayerPrompt, rotation: Rotation | None) -> Iterator[ReferredHead]:
    """All KV heads of prompts that have brought references, where they are used; none without the `rotation`."""
    if prompt.references is None or rotation is None:
        return
    lengths = prompt.lengths
    # Without padding the host need not wait for the device.
    counts = [prompt.columns] * len(prompt.keys) if prompt.pad is None else lengths.tolist()
    query = prompt.references.after(rotation, lengths.long()).unflatten(1, (prompt.layout.num_kv_heads, -1))
    # Of a prompt that ended early some were never seen.
    real = prompt.references.token < lengths[:, None] if prompt.early else None
    for which, cls in enumerate(prompt.layout.classes):
        for b, count in enumerate(counts):
            if not uses_references(cls, count):
                continue
            own = slice(prompt.columns - count, None)
            for place, head in enumerate(range(cls.start, cls.start + cls.count)):
                softmax = prompt.softmax.of(slice(head, head + 1), query.shape[2])
                references = HeadReferences(query[b, head], prompt.scaling, softmax, None if real is None else real[b])
                attended = references.attended(prompt.keys[b, head, own], prompt.values[b, head, own])
                yield ReferredHead(which, place, head, b, own, references, attended)
