"""Reference queries of a context in one layer: tokens chosen and values fitted with them as the runtime does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.kernels.softmax import Softmax
from kvcompile.profile.attention import Attention
from kvcompile.runtime.fitted import fit_head
from kvcompile.runtime.references import Attended, HeadReferences, References, reference_tokens
from kvcompile.runtime.rotation import Rotation
from kvcompile.stages import Rotary


@dataclass(frozen=True, eq=False)
class LayerReferences:
    """References f32 [num_heads, r, D] after a context, what multiplies their logits, and how these become weights."""

    query: Tensor
    scaling: float
    softmax: Softmax

    @classmethod
    def of(cls, call: Attention, queries: Tensor, length: int, rotary: Rotary) -> LayerReferences:
        """For a layer that attends as in `call`; `queries` are the `references` of a context of `length` tokens, and
        `rotary` is a table of one layer."""
        rotation = Rotation.of(rotary.frequency[0], rotary.partner, queries.device)
        lengths = torch.tensor([length], device=queries.device)
        found = References(queries[None], reference_tokens(lengths, len(queries) // len(call.key)))
        return cls(found.after(rotation, lengths)[0], call.scaling, call.softmax)

    def of_head(self, head: int, key: Tensor, value: Tensor) -> HeadLook:
        """What those of a KV head make of the context in the layer `key` and `value` [H, n, D]."""
        group = len(self.query) // len(key)
        own = self.query[head * group : (head + 1) * group]
        references = HeadReferences(own, self.scaling, self.softmax.of(slice(head, head + 1), group))
        return HeadLook(key[head], value[head], references, references.attended(key[head], value[head]))


@dataclass(frozen=True, eq=False)
class HeadLook:
    """Keys and values [n, D] of one KV head, its references, and what they have attended to."""

    key: Tensor
    value: Tensor
    references: HeadReferences
    attended: Attended

    def scores(self, score: Tensor) -> Tensor:
        """By which the head chooses, f32 [n], where the scorer's are `score` f32 [n]."""
        return self.attended.scores(score)

    def values(self, kept: Tensor) -> Tensor:
        """Values [n, D], of which those of the tokens `kept` bool [n] are fitted."""
        chosen, new = kept.nonzero()[:, 0], self.value.clone()
        fitted = fit_head(self.references, self.attended.output, self.key[chosen], self.value[chosen])
        new[chosen] = fitted.to(new.dtype)
        return new
