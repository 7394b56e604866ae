"""One decoder layer at a time: what it is called with, and how a sequence goes through it.

A profile looks at one layer after the other and sends every sequence through it before it turns to the next, so that a
layer's weights are needed once a pass, however many sequences there are (`kvcompile.models.resident`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcompile.profile.attention import Attention, Handler, causal, handling
from kvcompile.profile.context import Context, Packed, references
from kvcompile.profile.linear import going_on, left_behind, states_of
from kvcompile.profile.structure import attends, device_of, layers, lends, source_layer
from kvcompile.runtime.parts import attention_input, decoder_of
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


@dataclass(frozen=True, eq=False)
class OnTheWay:
    """A sequence on its way through the layers, in memory: its tokens and their positions, i64 [n], what it was
    `embedded` as, [1, n, d], and by number of the layer what later ones attend to."""

    calls: Calls
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    embedded: Tensor
    lent: dict[int, Lent] = field(default_factory=dict)

    def arguments(self, layer: int) -> dict[str, Any]:
        """What it goes through a layer with, beside its residual stream."""
        source = source_layer(self.calls.model, layer)
        known = None if source == layer else self.lent[source]
        return self.calls.of(layer, self.positions, self.ids, self.embedded, known)

    def through(self, layer: int, states: Tensor, attend: Handler) -> Tensor:
        """Its residual stream after a layer, from the one before it, [1, n, d] both."""
        model, arguments = self.calls.model, self.arguments(layer)
        after = through(layers(model)[layer], states, arguments, attend)
        if lends(model, layer):
            self.lent[layer] = self.calls.lent(layer, arguments)
        return after


def embedded(model: Any, ids: NDArray[np.int64]) -> Tensor:
    """The residual stream [1, n, d] of tokens [n] before the first layer."""
    tokens = torch.as_tensor(ids, device=device_of(model))[None]
    return _decoded(model, np.arange(len(ids)), False, input_ids=tokens)[0]


def through(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], attend: Handler) -> Tensor:
    """The residual stream after a layer, from the one before it, [1, n, d] both. The handler takes the layer for number
    0, as it knows of no other: what it looks up by layer has one entry."""
    with handling(lambda call: attend(replace(call, layer=0))):
        output: Tensor = layer(hidden, **arguments)
    return output


def as_far_as_attention(
    layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], watch: Callable[[Attention], None]
) -> None:
    """Have `watch` see the attention of a layer, of which nothing else is wanted: that, and all that comes after it, is
    left out."""

    def seen(call: Attention) -> NoReturn:
        watch(call)
        raise _SeenError

    with suppress(_SeenError):
        through(layer, hidden, arguments, seen)


class _SeenError(Exception):
    pass


@torch.no_grad()
def read_layer(
    model: Any, layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], attend: Handler = causal
) -> tuple[Tensor, Context]:
    """A context's residual stream after a layer of the model, [1, n, d] like `hidden` before it, and what it leaves in
    that layer: a `Context` of one layer."""
    if not attends(layer):
        with left_behind(model, [layer]) as states:
            return through(layer, hidden, arguments, attend), Context([], [], [], states)
    with _keeping(layer) as (context, keep):

        def attending(call: Attention) -> Tensor:
            keep(call)
            return attend(call)

        return through(layer, hidden, arguments, attending), context


@torch.no_grad()
def left_in_last(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Context:
    """What `read_layer` says that a context leaves in a layer of attention, where no layer comes after it."""
    with _keeping(layer) as (context, keep):
        as_far_as_attention(layer, hidden, arguments, keep)
    return context


@contextmanager
def _keeping(layer: nn.Module) -> Iterator[tuple[Context, Callable[[Attention], None]]]:
    """A `Context` of one layer, and what adds the keys and values of its attention."""
    context = Context([], [], [])

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context.hidden.append(attention_input(args, kwargs)[0])

    def keep(call: Attention) -> None:
        # Laid out as they are stored, whether they will be or not: products of other layouts differ in the last bits.
        context.keys.append(call.key.contiguous())
        context.values.append(call.value.contiguous())
        context.references.append(references(call))

    hook = layer.get_submodule("self_attn").register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield context, keep
    finally:
        hook.remove()


@contextmanager
def after(model: Any, layer: nn.Module, packed: Packed, left: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, follow-ups go through a layer of linear attention as going on from the context, which has `left` these
    tensors there (`tensors_of`). A layer of attention is as it is."""
    with going_on([layer], states_of(model, layer, left), packed.parts):
        yield


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
