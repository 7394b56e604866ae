"""A context that has been read, and follow-ups packed into one pass over it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcompile.kernels import followable, followed, prompt_attention
from kvcompile.profile.attention import Attention, Handler, attending, causal, masked, visible
from kvcompile.profile.linear import going_on, left_behind
from kvcompile.profile.structure import Tick, Trace, attention_layers, forward, layers
from kvcompile.runtime.parts import attention_input
from kvcompile.runtime.references import References


class FollowUp(Protocol):
    """What comes after a context: `ids` i64 [m]; rows from `first` on are judged."""

    @property
    def kind(self) -> str: ...
    @property
    def first(self) -> int: ...
    @property
    def ids(self) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class Context:
    """What a context of n tokens leaves in each layer of attention: `hidden` [n, d], the attention block's input;
    `keys` and `values` [H, n, D], rotary embedding applied. Lists over layers. `states` is what it leaves in layers of
    linear attention, see `left_behind`; `references` [num_heads, r, D] those of `references`, where they were
    kept."""

    hidden: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    states: Any = None
    references: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return self.keys[0].shape[1]


@dataclass(frozen=True)
class Block:
    """One follow-up's rows [start, stop) in the packed pass; those from `judged` on count."""

    kind: str
    start: int
    judged: int
    stop: int


@dataclass(frozen=True)
class Packed:
    """Follow-ups side by side in one sequence: each sees the context and itself, none sees another."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    blocks: tuple[Block, ...]

    @property
    def parts(self) -> list[slice]:
        """The rows of every follow-up."""
        return [slice(block.start, block.stop) for block in self.blocks]


def pack(length: int, follow_ups: Sequence[FollowUp]) -> Packed:
    """Put follow-ups to a context of `length` tokens into one pass; each starts at position `length`."""
    blocks, start = [], 0
    for one in follow_ups:
        blocks.append(Block(one.kind, start, start + one.first, start + len(one.ids)))
        start += len(one.ids)
    positions = np.concatenate([length + np.arange(len(one.ids)) for one in follow_ups])
    return Packed(np.concatenate([one.ids for one in follow_ups]), positions, tuple(blocks))


def read_context(model: Any, ids: NDArray[np.int64], tick: Tick = lambda _: None) -> Context:
    """Read a context [n] once."""
    context = Context([], [], [])

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context.hidden.append(attention_input(args, kwargs)[0])

    def attend(call: Attention) -> Tensor:
        context.keys.append(call.key)
        context.values.append(call.value)
        context.references.append(references(call))
        return causal(call)

    with ExitStack() as hooks:
        states = hooks.enter_context(left_behind(model, layers(model)))
        for layer in attention_layers(model):
            hooks.callback(layer.get_submodule("self_attn").register_forward_pre_hook(keep, with_kwargs=True).remove)
        hooks.enter_context(attending(model, attend))
        forward(model, ids, tick)
    return replace(context, states=states)


def references(call: Attention) -> Tensor:
    """The reference queries of a context [num_heads, r, D] that a layer reads."""
    length = torch.tensor([call.query.shape[1]], device=call.query.device)
    none_yet = References.none_yet(call.query[None], len(call.key), length)
    return none_yet.seen(call.query[None], torch.zeros_like(length)).query[0]


def over_context(
    context: Context, packed: Packed, kept: Sequence[Tensor | None] | None = None, known: Tensor | None = None
) -> Handler:
    """Attention of a packed pass. `kept`, by layer bool [H, n] or None for all, says which tokens of the context each
    KV head still has. `known` [Hq, m, D]: what comes out of it for these very inputs, where that is known."""

    masks: dict[tuple[int, int | None], Tensor] = {}  # the same in all layers, but for sliding windows

    def attend(call: Attention) -> Tensor:
        keys, values = context.keys[call.layer], context.values[call.layer]
        alive = None if kept is None else kept[call.layer]
        outputs = []
        for block in packed.blocks:
            own = slice(block.start, block.stop)
            own_query = call.query[None, :, own]
            if not call.quick and alive is None and followable(own_query[0], keys, call.window or 0, call.softmax):
                given = keys, values, call.key[:, own], call.value[:, own]
                output = None if known is None else known[:, own]
                outputs.append(followed(own_query[0], *given, call.scaling, output))
                continue
            own_keys = torch.cat([keys, call.key[:, own]], dim=1)[None]
            own_values = torch.cat([values, call.value[:, own]], dim=1)[None]
            if call.quick:
                window = call.window or 0
                seen = None, window, call.scaling, alive, call.softmax
                outputs.append(prompt_attention(own_query, own_keys, own_values, *seen)[0])
                continue
            shape = (block.stop - block.start, call.window)
            if shape not in masks:
                masks[shape] = _mask(len(context), *shape, keys.device)[None]
            mask = masks[shape]
            if alive is not None:
                # [H, m, n + m]: the follow-up's own tokens are never evicted.
                mask = mask & F.pad(alive, (0, block.stop - block.start), value=True)[:, None]
            outputs.append(
                masked(call, own_query[0], own_keys[0], own_values[0], mask if alive is not None else mask[0])
            )
        return torch.cat(outputs, dim=1)

    return attend


def after(model: Any, context: Context, packed: Packed) -> AbstractContextManager[None]:
    """Within, layers of linear attention take every follow-up as going on from the context."""
    return going_on(layers(model), context.states, packed.parts)


@torch.no_grad()
def follow(model: Any, context: Context, packed: Packed, attend: Handler, tick: Tick = lambda _: None) -> Trace:
    """The forward pass of follow-ups that are packed to go on from a context."""
    with attending(model, attend), after(model, context, packed):
        return forward(model, packed.ids, tick, packed.positions)


def judged(block: Block, most: int) -> Tensor:
    """Packed rows of a follow-up that are judged, at most `most`, evenly spread: int64."""
    count = min(most, block.stop - block.judged)
    return torch.from_numpy(np.linspace(block.judged, block.stop - 1, count).round().astype(np.int64))


def _mask(length: int, own: int, window: int | None, device: torch.device) -> Tensor:
    """bool [own, length + own]: what the rows after a context of `length` tokens see."""
    rows = torch.arange(length, length + own, device=device)
    return visible(rows, torch.arange(length + own, device=device), window)
