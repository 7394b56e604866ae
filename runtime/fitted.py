"""Values of a prompt's kept tokens, fitted so that attention to them comes to what attention to all of it would.

What is evicted takes its values out of every later output. The values that stay can make up for that: at reference
queries, whose attention to the whole prompt is known, they are the least squares solution (after Attention Matching,
arXiv 2602.16284, where kept keys get a bias too). Here

    V' = V + (W'W + ridge I)^-1 W' (O - W V)

for weights W [R, m] that R reference queries give to the m kept tokens, and their exact outputs O [R, D] over all n:
the ridge keeps the change small. The reference queries are the prompt's own, evenly spread
over it and turned on as if they came right after it: what the prompt asked of itself is what a text that quotes it or
goes on from it asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvcompile.artifacts import MASK_ELEMENTS, REFERENCES
from kvcompile.kernels import HeadClass, Softmax
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.rotation import Rotation

if TYPE_CHECKING:
    from kvcompile.runtime.layer_prompt import LayerPrompt

RIDGE = 1e-4
"""A reference query. KL is the same with 1.5e-5 and 5e-5, and a tenth higher with 5e-4 (docs/results.md)."""


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


def fits_values(cls: HeadClass, count: int) -> bool:
    """Whether the heads of a class get fitted values of prompts of so many tokens: their policy says so, and they
    evict."""
    return POLICIES[cls.policy].fits_values and count > cls.capacity


def fit_values(prompt: LayerPrompt, kept: Sequence[torch.Tensor], rotation: Rotation) -> torch.Tensor:
    """Values [B, num_kv_heads, n, D] of prompts with those of `kept` tokens (`kept_of`) fitted, where
    `fits_values`."""
    assert prompt.references is not None
    layout, pad, lengths = prompt.layout, prompt.columns - prompt.lengths.long(), prompt.lengths
    # Without padding the host need not wait for the device.
    counts = [prompt.columns] * len(prompt.keys) if prompt.pad is None else lengths.tolist()
    query = prompt.references.after(rotation, lengths.long()).unflatten(1, (layout.num_kv_heads, -1))
    group = query.shape[2]
    # Of a prompt that ended early some were never seen.
    real = prompt.references.token < lengths[:, None]
    values = prompt.values.clone()
    for cls, columns in zip(layout.classes, kept, strict=True):
        for b, count in enumerate(counts):
            if not fits_values(cls, count):
                continue
            own = slice(prompt.columns - count, None)
            for i, head in enumerate(range(cls.start, cls.start + cls.count)):
                stored = prompt.keys[b, head, own], prompt.values[b, head, own]
                index = columns[b, i] - pad[b]
                softmax = prompt.softmax.of(slice(head, head + 1), group)
                new = fit_head(query[b, head], *stored, index, prompt.scaling, softmax, real[b])
                values[b, head, columns[b, i]] = new.to(values.dtype)
    return values


def fit_head(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor,
    scaling: float,
    softmax: Softmax,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values f32 [m, D] of one KV head's `kept` int64 [m] tokens, of `keys` and `values` [n, D]: see above. `query` f32
    [group, r, D] are references after the prompt, of which those `real` bool [r] count (None: all)."""
    keys, values = keys.float(), values.float()
    weights, residual = [], []
    for rows in query.split(max(1, MASK_ELEMENTS // (len(query) * len(keys))), dim=1):
        logits = (rows @ keys.mT * scaling)[None]
        some = softmax.weights(logits[..., kept], None)[0]
        residual.append(softmax.weights(logits, None)[0] @ values - some @ values[kept])
        weights.append(some)
    w, left = torch.cat(weights, 1), torch.cat(residual, 1)
    if real is not None:
        w, left = w * real[:, None], left * real[:, None]
    w, left = w.flatten(0, 1), left.flatten(0, 1)
    ridge = RIDGE * len(w)
    # The same either way; the smaller system is solved.
    if len(w) < len(kept):
        return values[kept] + w.mT @ _solved(w @ w.mT, left, ridge)
    return values[kept] + _solved(w.mT @ w, w.mT @ left, ridge)


def _solved(gram: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
    gram.diagonal().add_(ridge)
    # Not `solve`, and without a look at whether it worked, for which the host would have to wait.
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(gram)[0])
