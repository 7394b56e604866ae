"""One attention function for all models, whose work a handler of ours does while a `with attending(...)` block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from kvcompile.artifacts.errors import ModelError
from kvcompile.profile.curves import BLOCK

IMPLEMENTATION = "kvcompile_profile"
"""The name under which transformers knows our attention function. It has no mask function on purpose: transformers then
builds no [n, n] mask, and causality and sliding windows are ours to apply, block by block."""


@dataclass(frozen=True)
class Attention:
    """What one layer's attention is asked for: one sequence, no cache, no padding.

    `query` [Hq, n, D], `key` and `value` [H, n, D], rotary embedding applied; `scaling` multiplies the logits.
    `window` is the width in tokens of the layer's sliding window, None where the whole sequence fits into it.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None


Handler = Callable[[Attention], Tensor]
"""Gives the attention output, [Hq, n, D]."""

_handler: ContextVar[Handler] = ContextVar("kvcompile_profile_handler")


@contextmanager
def attending(model: Any, handler: Handler) -> Iterator[None]:
    """Let `handler` do the attention of every layer of `model`; afterwards the model's own implementation is back."""
    previous = model.config._attn_implementation
    token = _handler.set(handler)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        model.set_attn_implementation(previous)
        _handler.reset(token)


def causal(call: Attention) -> Tensor:
    """Plain causal attention, [Hq, n, D], differentiable; a sliding window is applied in blocks of queries."""
    if call.window is None:
        return _sdpa(call.query, call.key, call.value, call.scaling, is_causal=True)
    outputs = []
    for first in range(0, call.query.shape[1], BLOCK):
        rows = torch.arange(first, min(first + BLOCK, call.query.shape[1]), device=call.query.device)
        start = max(0, first - call.window + 1)
        stop = first + len(rows)
        mask = visible(rows, torch.arange(start, stop, device=rows.device), call.window)
        outputs.append(
            _sdpa(call.query[:, rows], call.key[:, start:stop], call.value[:, start:stop], call.scaling, mask=mask)
        )
    return torch.cat(outputs, dim=1)


def masked(call: Attention, keep: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Attention of every KV head over its own choice of tokens, in blocks of queries; [Hq, n, D].

    `keep(rows, keys)` gives bool [H, len(rows), len(keys)] for positions `rows` and `keys`, causality included.
    """
    num_heads, length, head_dim = call.query.shape
    num_kv_heads = call.key.shape[0]
    # KV heads take the place of the batch, so that the query heads of a group share one mask.
    grouped = call.query.view(num_kv_heads, num_heads // num_kv_heads, length, head_dim)
    key, value = call.key[:, None], call.value[:, None]
    outputs = []
    for rows in torch.split(torch.arange(length, device=call.query.device), BLOCK):
        stop = int(rows[-1]) + 1
        mask = keep(rows, torch.arange(stop, device=rows.device))[:, None]
        outputs.append(
            F.scaled_dot_product_attention(
                grouped[:, :, rows],
                key[:, :, :stop],
                value[:, :, :stop],
                attn_mask=mask,
                scale=call.scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2).view(num_heads, length, head_dim)


def visible(rows: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """bool [len(rows), len(keys)]: which key positions a query position sees through causality and a sliding window."""
    distance = rows[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float, **masking: Any) -> Tensor:
    mask = masking.pop("mask", None)
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=scaling, enable_gqa=True, **masking
    )[0]


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if softcap is not None:
        raise ModelError(
            "the model caps its attention logits (attn_logit_softcapping), which profiling does not support"
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or attention_mask is not None:
        raise ValueError("profiling attends over one whole sequence at a time, without a cache and without padding")
    length, head_dim = query.shape[2:]
    call = Attention(
        layer=int(module.layer_idx),  # type: ignore[arg-type]
        query=query[0],
        key=key[0],
        value=value[0],
        scaling=head_dim**-0.5 if scaling is None else scaling,
        window=sliding_window if sliding_window is not None and sliding_window < length else None,
    )
    return _handler.get()(call).transpose(0, 1).contiguous()[None], None


AttentionInterface.register(IMPLEMENTATION, _forward)
