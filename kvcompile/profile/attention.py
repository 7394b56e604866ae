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

from kvcompile.kernels import Softmax, prompt_attention
from kvcompile.kernels import softmax as softmaxes
from kvcompile.profile.structure import attention_layers

BLOCK = 128
"""Queries handled at once wherever attention probabilities or masks are materialised."""

IMPLEMENTATION = "kvcompile_profile"
"""The name under which transformers knows our attention function. It has no mask function on purpose: transformers then
builds no [n, n] mask, and causality and sliding windows are ours to apply, block by block."""


@dataclass(frozen=True)
class Attention:
    """What one layer's attention is asked for: one sequence, no cache, no padding. `layer` is its number among the
    layers of attention.

    `query` [Hq, n, D], `key` and `value` [H, n, D], rotary embedding applied; `scaling` multiplies the logits.
    `window` is the size in tokens of the layer's sliding window, None where it has none; `softmax` is how logits become
    weights.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None
    softmax: Softmax = softmaxes.PLAIN

    @property
    def quick(self) -> bool:
        """Whether `prompt_attention` is for it: on a CPU, and without gradients, for which it has no formula."""
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (self.query, self.key, self.value))
        return self.query.device.type == "cpu" and not gradients

    @property
    def sliding(self) -> bool:
        """Whether the window is shorter than the sequence."""
        return self.window is not None and self.window < self.key.shape[1]


Handler = Callable[[Attention], Tensor]
"""Gives the attention output, [Hq, n, D]."""

_handler: ContextVar[Handler] = ContextVar("kvcompile_profile_handler")
_places: ContextVar[dict[int, int]] = ContextVar("kvcompile_profile_places")
"""The number of every layer among those of attention, by transformers' number of it."""


@contextmanager
def attending(model: Any, handler: Handler) -> Iterator[None]:
    """Let `handler` do the attention of every layer of `model`; afterwards the model's own implementation is back."""
    with attended(model), handling(handler):
        yield


@contextmanager
def attended(model: Any) -> Iterator[None]:
    """Have the layers of `model` ask whichever handler there is (`handling`) for their attention."""
    previous = model.config._attn_implementation
    own: list[Any] = attention_layers(model)
    token = _places.set({int(layer.self_attn.layer_idx): place for place, layer in enumerate(own)})
    hooks = [layer.register_forward_pre_hook(_tell_positions, with_kwargs=True) for layer in own]
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        model.set_attn_implementation(previous)
        _places.reset(token)
        for hook in hooks:
            hook.remove()


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Let `handler` do what the layers of an `attended` model ask for."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def causal(call: Attention) -> Tensor:
    """Plain causal attention inside the layer's window, [Hq, n, D], differentiable."""
    if call.quick:
        query, key, value = call.query[None], call.key[None], call.value[None]
        return prompt_attention(query, key, value, None, call.window or 0, call.scaling, softmax=call.softmax)[0]
    if call.window is not None and call.sliding:
        return streaming(call, sink=0, recent=call.window)
    if not call.softmax.plain:
        places = torch.arange(call.key.shape[1], device=call.key.device)
        return masked(call, call.query, call.key, call.value, visible(places, places, None))
    return F.scaled_dot_product_attention(
        call.query[None], call.key[None], call.value[None], is_causal=True, scale=call.scaling, enable_gqa=True
    )[0]


def masked(call: Attention, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Attention [Hq, m, D] as the layer of `call` weighs it, of `query` [Hq, m, D] to `key` and `value` [H, n, D], of
    which it sees `seen` bool [m, n] or [H, m, n]. Differentiable."""
    if not call.softmax.plain:
        by_head = seen if seen.dim() == 2 else seen[None, :, None]
        return softmaxes.attended(query[None], key[None], value[None], by_head, call.scaling, call.softmax)[0]
    mask = seen if seen.dim() == 2 else seen.repeat_interleave(len(query) // len(key), dim=0)[None]
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=call.scaling, enable_gqa=True
    )[0]


def streaming(call: Attention, sink: int, recent: int) -> Tensor:
    """Causal attention over the first `sink` tokens and the last `recent`, itself included; [Hq, n, D].

    In blocks of queries, each with no more keys than it sees.
    """
    outputs = []
    for rows in torch.split(torch.arange(call.query.shape[1], device=call.query.device), BLOCK):
        # Row t sees the sinks and (t - recent, t]; a block of rows together the sinks and [start, stop).
        start, stop = max(0, int(rows[0]) - recent + 1), int(rows[-1]) + 1
        keys = torch.arange(min(sink, start) + stop - start, device=rows.device)
        keys[sink:] += max(0, start - sink)
        mask = visible(rows, keys, recent) | (keys < sink) & visible(rows, keys, None)
        outputs.append(masked(call, call.query[:, rows], call.key[:, keys], call.value[:, keys], mask))
    return torch.cat(outputs, dim=1)


def visible(rows: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """bool [len(rows), len(keys)]: which key positions a query position sees through causality and a sliding window."""
    distance = rows[:, None] - keys
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


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
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or attention_mask is not None:
        raise ValueError("profiling attends over one whole sequence at a time, without a cache and without padding")
    head_dim, handler, places = query.shape[3], _handler.get(), _places.get()
    call = Attention(
        layer=places[int(module.layer_idx)],  # type: ignore[arg-type]
        query=query[0],
        key=key[0],
        value=value[0],
        scaling=head_dim**-0.5 if scaling is None else scaling,
        window=sliding_window,
        softmax=Softmax(softcap, None if s_aux is None else s_aux.float()),
    )
    return handler(call).transpose(0, 1).contiguous()[None], None


class _Positions:
    """In place of a cache, for layers that reckon the positions of new tokens from how many one holds."""

    def __init__(self, positions: Tensor) -> None:
        self._before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer: int) -> Tensor:
        """How many tokens are before each, less those that are given with it: int64 [n]."""
        return self._before

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Both as they are: nothing is held."""
        return key, value


def _tell_positions(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Packed follow-ups all begin after the context: Llama-4, whose queries are scaled by their positions in layers
    without rotary embedding, is to know."""
    if getattr(layer.self_attn, "attn_temperature_tuning", False):
        kwargs = kwargs | {"past_key_values": _Positions(kwargs["position_ids"][0])}
    return args, kwargs


AttentionInterface.register(IMPLEMENTATION, _forward)
