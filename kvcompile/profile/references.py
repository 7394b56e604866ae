"""Reference queries of a context in one layer: tokens chosen and values fitted with them as the runtime does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.kernels.softmax import Softmax
from kvcompile.profile.attention import Attention
from kvcompile.runtime.fitted import fit_head
from kvcompile.runtime.references import HeadReferences, References, reference_tokens
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

    def scores(self, head: int, key: Tensor, score: Tensor) -> Tensor:
        """By which a KV head of the layer `key` [H, n, D] chooses, f32 [n], where the scorer's `score` is [H, n]."""
        return self._of(head, len(key)).scores(key[head], score[head])

    def values(self, head: int, key: Tensor, value: Tensor, kept: Tensor) -> Tensor:
        """Values [n, D] of a KV head of the layer `key` and `value` [H, n, D], of which those of the tokens `kept` bool
        [n] are fitted."""
        chosen, new = kept.nonzero()[:, 0], value[head].clone()
        new[chosen] = fit_head(self._of(head, len(key)), key[head], value[head], chosen).to(new.dtype)
        return new

    def _of(self, head: int, num_kv_heads: int) -> HeadReferences:
        group = len(self.query) // num_kv_heads
        own = self.query[head * group : (head + 1) * group]
        return HeadReferences(own, self.scaling, self.softmax.of(slice(head, head + 1), group))
