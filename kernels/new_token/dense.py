"""`new_token` in torch, a step at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels.add_norm.dense import normed
from kvcompile.kernels.append.api import append
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.new_token.parts import HeadNorms, LinearScorer
from kvcompile.kernels.transform import Transform


def new_token(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    scores: torch.Tensor,
    layout: LayerLayout,
    seen: Sequence[int] | torch.Tensor,
    transform: Transform | None,
    norms: HeadNorms | None,
    hidden: torch.Tensor | None,
    scorer: LinearScorer | None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `api.new_token`."""
    by_head = qkv.unflatten(1, (-1, keys.head_dim))
    heads = layout.num_kv_heads
    query, key, value = by_head.split([by_head.shape[1] - 2 * heads, heads, heads], 1)
    if norms is not None:
        query, key = (normed(x, w, norms.epsilon) for x, w in ((query, norms.query), (key, norms.key)))
    query, key = (rotated(x, cos[:, None], sin[:, None])[:, :, None] for x in (query, key))
    value = value[:, :, None]
    if transform is not None:
        query = transform.queries(query)
        key, value = transform.keys(key).to(key.dtype), transform.values(value).to(value.dtype)
    score = None
    if scorer is not None and hidden is not None:
        score = torch.nn.functional.linear(hidden.float(), scorer.weight, scorer.bias)
    append(keys, values, scores, layout, key[:, :, 0], value[:, :, 0], score, seen, places)
    return query


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [..., D]; element i is rotated with element i + D/2."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
