"""Layers of linear attention in a profile: what a context leaves in them, and follow-ups that go on from there.

A packed pass has its follow-ups side by side, and attention keeps them apart by what each row sees. A recurrence would
run through all of them. So every follow-up goes through such a layer by itself, from the state that the context left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

SOME = 8
"""Tokens with which a layer is run so that its state gets its shape, which does not depend on their number."""


def _modules(layers: Sequence[nn.Module]) -> list[Any]:
    return [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]


@contextmanager
def left_behind(model: Any, layers: Sequence[nn.Module]) -> Iterator[Any]:
    """Gives the cache (transformers') in which the pass inside the block leaves the state of every such layer among
    `layers` of a model, None where there is none."""
    modules = _modules(layers)
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


def tensors_of(states: Any, layer: nn.Module) -> dict[str, Tensor]:
    """What `left_behind` gave of one layer, as tensors by name; none for a layer of attention."""
    return {name: slot[key] for module in _modules([layer]) for name, slot, key in _slots(states, module)}


def states_of(model: Any, layer: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """The cache of which `tensors_of` has given the tensors; None for a layer of attention."""
    if not _modules([layer]):
        return None
    (module,) = _modules([layer])
    width = model.config.get_text_config().hidden_size
    with torch.no_grad(), left_behind(model, [layer]) as states:
        module(hidden_states=next(iter(tensors.values())).new_zeros(1, SOME, width, dtype=model.dtype))
    for name, slot, key in _slots(states, module):
        slot[key] = tensors[name]
    return states


def _slots(states: Any, module: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where the tensors of a layer's state are: a name, a dictionary, and the key there."""
    own = vars(states.layers[module.layer_idx])
    for name, value in own.items():
        if isinstance(value, Tensor):
            yield name, own, name
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", value, key) for key in value if isinstance(value[key], Tensor))


@contextmanager
def going_on(layers: Sequence[nn.Module], states: Any, parts: Sequence[slice]) -> Iterator[None]:
    """Within, such layers among `layers` take each of the `parts` of a sequence as going on from `states`, what
    `left_behind` gave."""
    if states is None:
        yield
        return
    with _instead(layers, lambda module: _apart(module.forward, states, module.layer_idx, parts)):
        yield


def switched_off(layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Within, such layers add nothing to the residual stream."""
    return _instead(layers, lambda module: lambda hidden_states, **_: torch.zeros_like(hidden_states))


@contextmanager
def _instead(layers: Sequence[nn.Module], other: Callable[[Any], Callable[..., Tensor]]) -> Iterator[None]:
    with ExitStack() as undo:
        for module in _modules(layers):
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
