"""Where the parts of a transformers decoder are, and how to run it without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcompile.artifacts import planned_heads
from kvcompile.runtime.parts import decoder_of, planned, sources

LOGITS_AT_ONCE = 1 << 24
"""Elements of the logits that are computed at once, whatever the vocabulary. With a quarter of them, products with the
head of a large vocabulary have so few rows (27) that they wait for its weights, at two thirds of the speed."""

Tick = Callable[[int], None]
"""Told of work done, in tokens x layers."""


@dataclass(frozen=True)
class Trace:
    """What a forward pass leaves for the backward pass: `inputs`, the residual stream [1, n, d] before every layer;
    `arguments`, the other arguments of every layer; `final`, the residual stream [n, d] before the last norm."""

    inputs: list[Tensor]
    arguments: list[dict[str, Any]]
    final: Tensor


def layers(model: Any) -> list[nn.Module]:
    """The decoder layers, first to last."""
    return list(decoder_of(model).layers)


def attention_layers(model: Any) -> list[nn.Module]:
    """Those that have keys and values."""
    return [layer for layer in layers(model) if attends(layer)]


def planned_layers(model: Any) -> list[nn.Module]:
    """Those that a plan is for: a profile numbers these."""
    return [layer for layer in layers(model) if planned(layer)]


def attends(layer: nn.Module) -> bool:
    """Whether a layer has keys and values; one of linear attention has a state instead."""
    return hasattr(layer, "self_attn")


_places: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()


def place_of(model: Any, layer: int) -> int:
    """The number that a profile gives to a layer: how many that a plan is for are before it."""
    if model not in _places:  # transformers' configurations take their time, and every step of a profile asks
        _places[model] = [0, *accumulate(int(planned(one)) for one in layers(model))]
    return _places[model][layer]


def source_layer(model: Any, layer: int) -> int:
    """The number of the layer whose keys and values a layer attends to: its own, but for some models' last layers."""
    return sources(model)[layer]


def lends(model: Any, layer: int) -> bool:
    """Whether later layers attend to the keys and values of a layer."""
    return layer in sources(model)[layer + 1 :]


def last_own(model: Any) -> int:
    """The number of the last layer with keys and values, or a state, of its own: what a context leaves behind does not
    depend on the layers after it."""
    return max(sources(model))


def embedding(model: Any) -> nn.Module:
    """What turns tokens into the first residual stream."""
    part: nn.Module = model.get_input_embeddings()
    return part


def head(model: Any) -> nn.Module:
    """What turns the last residual stream into logits."""
    part: nn.Module = model.get_output_embeddings()
    return part


def device_of(model: Any) -> torch.device:
    """Where a model computes: where its last norm is, as other weights may not be there yet."""
    device: torch.device = next(decoder_of(model).norm.parameters()).device
    return device


def heads(model: Any) -> tuple[int, int]:
    """Numbers of query heads and of KV heads in every layer that a plan is for."""
    return model.config.get_text_config().num_attention_heads, planned_heads(model.config)[0]


def head_dim(model: Any) -> int:
    """Components of a head's queries, keys and values in such a layer."""
    return planned_heads(model.config)[1]


def head_blocks(model: Any, length: int) -> Iterator[slice]:
    """Blocks of positions small enough for their logits to be held at once."""
    step = max(1, LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits [m, vocab] of residual streams [m, d] as they leave the last layer, before the last norm."""
    return _bounded(model, model.get_output_embeddings()(decoder_of(model).norm(hidden[None]))[0])


def chosen_logits(model: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Those of some tokens, i64 [m, k], alone: f32 [m, k]."""
    head = model.get_output_embeddings()
    scores = (decoder_of(model).norm(hidden[None])[0, :, None].float() * head.weight[tokens].float()).sum(-1)
    return _bounded(model, scores if head.bias is None else scores + head.bias[tokens].float())


def _bounded(model: Any, scores: Tensor) -> Tensor:
    """What becomes of the head's products."""
    config = model.config.get_text_config()
    scores = scores / (getattr(config, "logits_scaling", None) or 1.0)  # Granite's
    cap = getattr(config, "final_logit_softcapping", None)
    return scores if cap is None else torch.tanh(scores / cap) * cap


@torch.no_grad()
def forward(
    model: Any, ids: NDArray[np.int64], tick: Tick = lambda _: None, positions: NDArray[np.int64] | None = None
) -> Trace:
    """One forward pass over `ids` [n], at `positions` [n] or from 0 on, that keeps nothing but the layers' inputs."""
    inputs: list[Tensor] = []
    arguments: list[dict[str, Any]] = []
    final: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0])
        arguments.append(kwargs)
        tick(len(ids))

    def keep_final(_: nn.Module, args: tuple[Tensor]) -> None:
        final.append(args[0][0])

    decoder = decoder_of(model)
    with ExitStack() as hooks:
        for layer in layers(model):
            hooks.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        hooks.callback(decoder.norm.register_forward_pre_hook(keep_final).remove)
        places = None if positions is None else torch.as_tensor(positions, device=device_of(model))[None]
        decoder(input_ids=torch.as_tensor(ids, device=device_of(model))[None], position_ids=places, use_cache=False)
    return Trace(inputs, arguments, final[0])


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients for parameters; afterwards every module and parameter is as it was."""
    training = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, was_training in training:
            module.training = was_training
        for parameter, required_grad in gradients:
            parameter.requires_grad_(required_grad)
