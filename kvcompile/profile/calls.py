"""What the layers of a model are called with, for any sequence, without a layer being run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcompile.profile.structure import device_of, layers
from kvcompile.runtime.parts import decoder_of
from kvcompile.runtime.token_inputs import has_token_inputs, left_out, token_input

Lent = tuple[Tensor, Tensor]
"""Keys and values [1, H, n, D] of one layer that a later one attends to."""

SHARED = "shared_kv_states"
"""The argument in which transformers hands these on: a dict by the type of the layer."""

Arguments = list[dict[str, Any]]
"""What every layer is called with beside the hidden states, for sequences at the same positions."""


class Calls:
    """The arguments of a model's layers, made by its own decoder, which runs without layers; with `exact`, rotary
    tables are in float32 whatever the model's dtype."""

    def __init__(self, model: Any, exact: bool = False) -> None:
        self.model, self.exact = model, exact
        self._known: dict[bytes, Arguments] = {}

    def at(self, positions: NDArray[np.int64]) -> Arguments:
        """The arguments for a sequence at `positions` [n]."""
        key = positions.astype("<i8").tobytes()
        if key not in self._known:
            width = self.model.config.get_text_config().hidden_size
            nothing = torch.zeros(1, len(positions), width, dtype=self.model.dtype, device=device_of(self.model))
            self._known[key] = _decoded(self.model, positions, self.exact, inputs_embeds=nothing)[1]
        return self._known[key]

    def of(
        self,
        layer: int,
        positions: NDArray[np.int64],
        ids: NDArray[np.int64],
        embedded: Tensor | None,
        lent: Lent | None = None,
    ) -> dict[str, Any]:
        """The arguments of one layer for tokens `ids` [n]. Where it has inputs by token, they are of what these were
        `embedded` as, [1, n, d]; where it attends to another layer's keys and values, they are what that one has
        `lent`."""
        found = self.at(positions)[layer]
        if has_token_inputs(self.model):
            assert embedded is not None
            tokens = torch.as_tensor(ids, device=embedded.device)[None]
            with torch.no_grad():
                found = found | {"per_layer_input": token_input(self.model, tokens, embedded, layer)}
        if SHARED in found:
            found = found | {SHARED: {} if lent is None else {self._kind(layer): lent}}
        return found

    def lent(self, layer: int, arguments: dict[str, Any]) -> Lent:
        """The keys and values that a layer has left among its arguments for later ones."""
        found: Lent = arguments[SHARED][self._kind(layer)]
        return found

    def _kind(self, layer: int) -> str:
        return str(layers(self.model)[layer].get_submodule("self_attn").layer_type)


def embedded(model: Any, ids: NDArray[np.int64]) -> Tensor:
    """The residual stream [1, n, d] of tokens [n] before the first layer."""
    tokens = torch.as_tensor(ids, device=device_of(model))[None]
    return _decoded(model, np.arange(len(ids)), False, input_ids=tokens)[0]


@torch.no_grad()
def _decoded(model: Any, positions: NDArray[np.int64], exact: bool, **inputs: Tensor) -> tuple[Tensor, Arguments]:
    """The residual stream before the first layer, and the layers' arguments."""
    decoder = decoder_of(model)
    places = torch.as_tensor(positions, device=device_of(model))[None]
    with _passing(decoder) as (seen, hidden), _own_rotary(decoder, exact), left_out(model):
        decoder(**inputs, position_ids=places, use_cache=False)
    return hidden[0], seen


class _Passing(nn.Module):
    """Stands for a layer: hands on what it is given, and notes it."""

    def __init__(self, layer: nn.Module, note: Callable[[Tensor, dict[str, Any]], None]) -> None:
        super().__init__()
        # Not as a submodule: what the decoder asks of its layers is answered by the layer itself.
        vars(self).update(layer=layer, note=note)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)

    def forward(self, hidden: Tensor, *_: Any, **arguments: Any) -> Tensor:
        self.note(hidden, arguments)
        return hidden


@contextmanager
def _passing(decoder: Any) -> Iterator[tuple[Arguments, list[Tensor]]]:
    """Have stand-ins for all layers; what they were given, and the hidden states [1, n, d]."""
    seen: Arguments = []
    hidden: list[Tensor] = []

    def note(states: Tensor, arguments: dict[str, Any]) -> None:
        hidden.append(states)
        seen.append(arguments)

    own = decoder.layers
    try:
        decoder.layers = nn.ModuleList([_Passing(layer, note) for layer in own])
        yield seen, hidden
    finally:
        decoder.layers = own


@contextmanager
def _own_rotary(decoder: nn.Module, exact: bool) -> Iterator[None]:
    """Leave the model's rotary embedding as it is: some change with the lengths that they have seen."""

    def in_float(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (args[0].float(), *args[1:]), kwargs

    own = getattr(decoder, "rotary_emb", None)
    if own is None:
        yield
        return
    try:
        copied: nn.Module = copy.deepcopy(own)
        if exact:
            copied.register_forward_pre_hook(in_float, with_kwargs=True)
        decoder.rotary_emb = copied
        yield
    finally:
        decoder.rotary_emb = own
