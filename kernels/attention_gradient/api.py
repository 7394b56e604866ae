"""Attention of a follow-up to a context and to itself, as a function that autograd knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.attention_gradient import dense
from kvcompile.kernels.native import gradient, prompt
from kvcompile.kernels.prompt_attention.api import prompt_attention
from kvcompile.kernels.softmax import Softmax


def followed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    scaling: float,
    known: Tensor | None = None,
) -> Tensor:
    """Attention of a follow-up that sees all of a context and itself causally; differentiable with respect to the
    follow-up, while the context is taken as given.

    Args:
        query: [num_heads, m, D].
        keys, values: [H, n, D] of the context, rotary embedding applied.
        own_keys, own_values: [H, m, D] of the follow-up.
        scaling: factor on the logits.
        known: [num_heads, m, D], the result, where it is known: nothing but the way to its gradient is made then.

    Returns:
        [num_heads, m, D] in the query's dtype.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    output: Tensor = _Followed.apply(scaling, known, query, keys, values, own_keys, own_values)
    return output


def followable(query: Tensor, keys: Tensor, window: int, softmax: Softmax) -> bool:
    """Whether attention is a plain softmax with nothing outside of a sliding window, and both ways are in C here, so
    that `followed` is better than what torch has."""
    with torch.no_grad():
        forward = prompt.usable(query[None], keys[None], keys[None], 1.0)
    return forward and gradient.usable(query, keys, window, softmax)


class _Followed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scaling: float, known: Tensor | None, *vectors: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*vectors)
        ctx.scaling = scaling
        if known is not None:
            return known.clone()
        query, keys, values, own_keys, own_values = vectors
        both = (torch.cat(pair, dim=1)[None] for pair in ((keys, own_keys), (values, own_values)))
        return prompt_attention(query[None], *both, None, 0, scaling)[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, keys, values, own_keys, own_values = ctx.saved_tensors
        chosen = gradient if gradient.usable(query, keys) else dense
        args = query, upstream, keys, values, own_keys, own_values, ctx.scaling
        by_query, by_key, by_value = chosen.attention_gradient(*args)
        return None, None, by_query, None, None, by_key, by_value
