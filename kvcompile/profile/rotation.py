"""Which rotary embedding a model has, read from its own tables of cos and sin, and keys and queries without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcompile.artifacts.errors import ModelError
from kvcompile.models.resident import in_turn, resident
from kvcompile.profile.attention import Attention, attended
from kvcompile.profile.calls import Arguments, Calls, embedded
from kvcompile.profile.layerwise import through
from kvcompile.profile.linear import switched_off
from kvcompile.profile.structure import embedding, frozen, last_own, layers
from kvcompile.runtime.parts import planned
from kvcompile.runtime.rotation import Rotation
from kvcompile.stages import Rotary

Layout = tuple[NDArray[np.float32], NDArray[np.int32]]
"""Signed frequencies [D] and partners [D] of one layer, as in `kvcompile.stages.Rotary`."""

TOLERANCE = 0.05
"""Relative error up to which a rotation explains the keys: a wrong one is off by about 1, bfloat16 by 1/200."""


FAR = 1 << 18
"""Positions from here on say nothing of the layout: float32 no longer holds their angles well enough."""


def read_rotary(model: Any, context: int) -> Rotary:
    """The rotary embedding that a model applies in sequences of `context` tokens; see `read_rotaries`."""
    return read_rotaries(model, (context,))[0]


def read_rotaries(model: Any, contexts: Sequence[int]) -> list[Rotary]:
    """The rotary embedding that a model applies in sequences of so many tokens, for every one of `contexts`.

    The same token is read at a few positions with attention switched off, so that keys differ by their rotation alone;
    the angles are those of the tables that the layers are given, and the layout is the one that explains the keys. All
    lengths go through a layer before the next one is looked at.

    Raises:
        ModelError: keys that depend on positions in no way known.
    """
    longest = int(model.config.get_text_config().max_position_embeddings)
    others = {context: {2, longest, 2 * max(context, longest)} - {context} for context in contexts}
    found = _read(model, sorted({*contexts, *(length for several in others.values() for length in several)}))
    rotaries = []
    for context in contexts:
        here = found[context]
        same = all(
            np.allclose(here.frequency, found[other].frequency, rtol=1e-5, atol=1e-9) for other in others[context]
        )
        rotaries.append(Rotary(here.frequency, here.partner, 0 if same else context))
    return rotaries


def unrotated(stored: Tensor, positions: Tensor, rotary: Rotary, layer: int) -> Tensor:
    """Keys or queries [..., n, D] of one layer, at `positions` [n], as they were before the rotation; float32."""
    return rotated(stored, -positions, rotary, layer)


def rotated(stored: Tensor, positions: Tensor, rotary: Rotary, layer: int) -> Tensor:
    """R(p) x of `kvcompile.quantiser.rotary`, float32."""
    return Rotation.of(rotary.frequency[layer], rotary.partner, stored.device).turned(stored, positions)


def of_layer(rotary: Rotary, layer: int) -> Rotary:
    """The rotary embedding of one layer, as a table of one layer."""
    return replace(rotary, frequency=rotary.frequency[layer : layer + 1])


@dataclass
class _Sequence:
    """A token at some `positions` [n], and what is found of it: its residual stream [1, n, d] as far as it has come,
    the layers' arguments, the angles a token [w] of each layer's tables, and each layer's layout."""

    positions: Tensor
    hidden: Tensor
    arguments: Arguments
    tables: list[Tensor | None]
    layouts: list[Layout]


@torch.no_grad()
def _read(model: Any, lengths: Sequence[int]) -> dict[int, Rotary]:
    with frozen(model), attended(model):
        with resident(embedding(model)):
            sequences = [_sequence(model, length) for length in lengths]
        for number, layer in enumerate(in_turn(layers(model)[: last_own(model) + 1])):
            for one in sequences:
                _go_through(number, layer, one)
    return {length: _rotary(one.layouts) for length, one in zip(lengths, sequences, strict=True)}


def _sequence(model: Any, length: int) -> _Sequence:
    # Near positions tell fast components apart, far ones the slow ones.
    near = min(length, FAR)
    positions = np.unique([0, 1, *(int(near * part) for part in (0.1, 0.3, 0.7)), length - 1])
    ids = np.full(len(positions), _some_token(model))
    hidden, calls = embedded(model, ids), Calls(model, exact=True)
    arguments, tables = [], list[Tensor | None]()
    for number in range(last_own(model) + 1):
        one = calls.of(number, positions, ids, hidden)
        pair = one.get("position_embeddings")
        if isinstance(pair, Tensor):
            tables.append(pair[0, 1].angle())  # the second position is 1
        elif pair is not None:
            cos, sin = (part[0] for part in pair)
            tables.append(torch.atan2(sin[1], cos[1]))
            one = one | {"position_embeddings": tuple(part.to(hidden.dtype) for part in pair)}
        else:
            tables.append(None)
        arguments.append(one)
    return _Sequence(torch.from_numpy(positions).to(hidden.device), hidden, arguments, tables, [])


def _go_through(number: int, layer: nn.Module, one: _Sequence) -> None:
    keys: list[Tensor] = []

    def attend(call: Attention) -> Tensor:
        keys.append(call.key.float())
        return torch.zeros_like(call.query, dtype=call.value.dtype)

    with switched_off([layer]):
        one.hidden = through(layer, one.hidden, one.arguments[number], attend)
    if not planned(layer):
        return
    (key,) = keys
    layouts = list(_layouts(one.tables[number], key.shape[-1]))
    key, positions = key[:, one.positions < FAR], one.positions[one.positions < FAR]
    still = key[:, :1].expand_as(key)  # as at position 0
    apart = [float((rotated(still, positions, Rotary(f[None], p), 0) - key).norm()) for f, p in layouts]
    best = int(np.argmin(apart))
    if apart[best] > TOLERANCE * float(key.norm()):
        raise ModelError(
            f"layer {number} rotates its keys in an unknown way: profiling supports rotary embedding that pairs "
            "neighbouring or opposite components"
        )
    one.layouts.append(layouts[best])


def _rotary(found: Sequence[Layout]) -> Rotary:
    # Layers without a rotation have no partners to compare.
    partners = [partner for frequency, partner in found if frequency.any()]
    partner = partners[0] if partners else found[0][1]
    if any((other != partner).any() for other in partners):
        raise ModelError("the layers pair different components in their rotary embedding: expected the same in all")
    return Rotary(np.stack([frequency for frequency, _ in found]), partner)


def _layouts(table: Tensor | None, head_dim: int) -> Iterator[Layout]:
    """The layouts that a table of angles a token [w] may belong to; no rotation last."""
    if table is not None:
        angles = table.cpu().numpy().astype(np.float32)
        # A table holds every pair's angle twice, one half after the other or side by side, or once.
        for pairs in (angles[: len(angles) // 2], angles[::2], angles):
            rotated_dim = 2 * len(pairs)
            if not 0 < rotated_dim <= head_dim:
                continue
            # Component d rotates with d + w/2 (Llama), or with d + 1 (GPT-J, Cohere); the rest, if any, stays.
            opposite, neighbours = (np.arange(rotated_dim // 2), rotated_dim // 2), (np.arange(0, rotated_dim, 2), 1)
            for first, apart in (opposite, neighbours):
                second = first + apart
                frequency = np.zeros(head_dim, np.float32)
                partner = np.arange(head_dim, dtype=np.int32)
                frequency[first], frequency[second] = pairs, -pairs
                partner[first], partner[second] = second, first
                yield frequency, partner
    yield np.zeros(head_dim, np.float32), np.arange(head_dim, dtype=np.int32)


def _some_token(model: Any) -> int:
    """Any token but the first few, which are often padding."""
    return int(min(100, model.get_input_embeddings().weight.shape[0] - 1))
