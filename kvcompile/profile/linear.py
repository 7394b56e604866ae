"""Layers of linear attention in a profile: what a context leaves in them, and follow-ups that go on from there.

A packed pass has its follow-ups side by side, and attention keeps them apart by what each row sees. A recurrence would
run through all of them. So every follow-up goes through such a layer by itself, from the state that the context left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvcompile.profile.structure import layers


def _modules(model: Any) -> list[Any]:
    return [layer.linear_attn for layer in layers(model) if hasattr(layer, "linear_attn")]


@contextmanager
def left_behind(model: Any) -> Iterator[Any]:
    """Gives the cache (transformers') in which the pass inside the block leaves the state of every such layer, None for
    a model without any."""
    modules = _modules(model)
    if not modules:
        yield None
        return
    cache = DynamicCache(config=model.config.get_text_config())

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"cache_params": cache}

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield cache


@contextmanager
def going_on(model: Any, states: Any, parts: Sequence[slice]) -> Iterator[None]:
    """Within, such layers take each of the `parts` of a sequence as going on from `states`, what `left_behind` gave."""
    if states is None:
        yield
        return
    with _instead(model, lambda module: _apart(module.forward, states, module.layer_idx, parts)):
        yield


def switched_off(model: Any) -> AbstractContextManager[None]:
    """Within, such layers add nothing to the residual stream."""
    return _instead(model, lambda module: lambda hidden_states, **_: torch.zeros_like(hidden_states))


@contextmanager
def _instead(model: Any, other: Callable[[Any], Callable[..., Tensor]]) -> Iterator[None]:
    with ExitStack() as undo:
        for module in _modules(model):
            undo.callback(_restore, module, vars(module).get("forward"))
            module.forward = other(module)
        yield


def _restore(module: Any, before: Any) -> None:
    if before is None:
        vars(module).pop("forward", None)
    else:
        module.forward = before


def _apart(forward: Callable[..., Tensor], states: Any, layer: int, parts: Sequence[slice]) -> Callable[..., Tensor]:
    def each(hidden_states: Tensor, **arguments: Any) -> Tensor:
        found = []
        for part in parts:
            arguments["cache_params"] = _fork(states, layer)
            found.append(forward(hidden_states=hidden_states[:, part], **arguments))
        return torch.cat(found, 1)

    return each


def _fork(states: Any, layer: int) -> Any:
    """The cache with a copy of one layer's state, which does not keep what comes next: gradients run through it."""
    fork = copy.copy(states)
    own = copy.deepcopy(states.layers[layer])
    own.update_recurrent_state = lambda state, *args, **kwargs: state
    fork.layers = list(states.layers)
    fork.layers[layer] = own
    return fork
