"""One decoder layer at a time: how a sequence goes through it, and what it leaves there.

A profile looks at one layer after the other and sends every sequence through it before it turns to the next, so that a
layer's weights are needed once a pass, however many sequences there are (`kvcompile.models.resident`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcompile.profile.attention import Attention, Handler, causal, handling
from kvcompile.profile.calls import Calls, Lent
from kvcompile.profile.context import Context, Packed, references
from kvcompile.profile.linear import going_on, left_behind, states_of
from kvcompile.profile.structure import attends, layers, lends, source_layer
from kvcompile.runtime.parts import attention_input


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
