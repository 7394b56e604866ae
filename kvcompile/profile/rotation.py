"""Which rotary embedding a model has, read from its own tables of cos and sin, and keys and queries without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcompile.artifacts.errors import ModelError
from kvcompile.profile.attention import Attention, attending
from kvcompile.profile.linear import switched_off
from kvcompile.profile.structure import attention_layers, forward, frozen
from kvcompile.stages import Rotary

Layout = tuple[NDArray[np.float32], NDArray[np.int32]]
"""Signed frequencies [D] and partners [D] of one layer, as in `kvcompile.stages.Rotary`."""

TOLERANCE = 0.05
"""Relative error up to which a rotation explains the keys: a wrong one is off by about 1, bfloat16 by 1/200."""


def read_rotary(model: Any, context: int) -> Rotary:
    """The rotary embedding that a model applies in sequences of `context` tokens.

    The same token is read at a few positions with attention switched off, so that keys differ by their rotation alone;
    the angles are those of the tables that the layers are given, and the layout is the one that explains the keys.

    Raises:
        ModelError: keys that depend on positions in no way known.
    """
    here = _read(model, context)
    longest = int(model.config.get_text_config().max_position_embeddings)
    others = [_read(model, length) for length in {2, longest, 2 * max(context, longest)} - {context}]
    same = all(np.allclose(here.frequency, other.frequency, rtol=1e-5, atol=1e-9) for other in others)
    return Rotary(here.frequency, here.partner, 0 if same else context)


def unrotated(stored: Tensor, positions: Tensor, rotary: Rotary, layer: int) -> Tensor:
    """Keys or queries [..., n, D] of one layer, at `positions` [n], as they were before the rotation; float32."""
    return rotated(stored, -positions, rotary, layer)


def rotated(stored: Tensor, positions: Tensor, rotary: Rotary, layer: int) -> Tensor:
    """R(p) x of `kvcompile.quantiser.rotary`, float32."""
    frequency = torch.from_numpy(rotary.frequency[layer]).to(stored.device)
    partner = torch.from_numpy(rotary.partner).long().to(stored.device)
    angle = positions[:, None] * frequency
    x = stored.float()
    return angle.cos() * x - angle.sin() * x[..., partner]


def _read(model: Any, context: int) -> Rotary:
    # Near positions tell fast components apart, far ones the slow ones.
    positions = np.unique([0, 1, *(int(context * part) for part in (0.1, 0.3, 0.7)), context - 1])
    keys: list[Tensor] = []

    def attend(call: Attention) -> Tensor:
        keys.append(call.key.float())
        return torch.zeros_like(call.query, dtype=call.value.dtype)

    ids = np.full(len(positions), _some_token(model))
    with frozen(model), _tables(model) as tables, attending(model, attend), switched_off(model):
        forward(model, ids, positions=positions)
    where = torch.from_numpy(positions).to(keys[0].device)
    head_dim = keys[0].shape[-1]
    found: list[Layout] = []
    for layer, (key, table) in enumerate(zip(keys, tables, strict=True)):
        layouts = list(_layouts(table, head_dim))
        still = key[:, :1].expand_as(key)  # as at position 0
        apart = [float((rotated(still, where, Rotary(f[None], p), 0) - key).norm()) for f, p in layouts]
        best = int(np.argmin(apart))
        if apart[best] > TOLERANCE * float(key.norm()):
            raise ModelError(
                f"layer {layer} rotates its keys in an unknown way: profiling supports rotary embedding that pairs "
                "neighbouring or opposite components"
            )
        found.append(layouts[best])
    # Layers without a rotation have no partners to compare.
    partners = [partner for frequency, partner in found if frequency.any()]
    partner = partners[0] if partners else np.arange(head_dim, dtype=np.int32)
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


@contextmanager
def _tables(model: Any) -> Iterator[list[Tensor | None]]:
    """Fill in, by layer, the angle a token [w] of the tables that it is given in the block, in float32 whatever the
    model's dtype. The model's own rotary module is left alone: some change with the length they see."""
    decoder = model.get_decoder()
    seen: list[Tensor | None] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        pair = kwargs.get("position_embeddings")
        if pair is None:
            seen.append(None)
            return args, kwargs
        cos, sin = (one[0] for one in pair)
        seen.append(torch.atan2(sin[1], cos[1]))  # the second position is 1
        return args, kwargs | {"position_embeddings": tuple(one.to(args[0].dtype) for one in pair)}

    def in_float(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (args[0].float(), *args[1:]), kwargs

    own = getattr(decoder, "rotary_emb", None)
    with ExitStack() as undo:
        if own is not None:
            undo.callback(setattr, decoder, "rotary_emb", own)
            decoder.rotary_emb = copy.deepcopy(own)
            decoder.rotary_emb.register_forward_pre_hook(in_float, with_kwargs=True)
        for layer in attention_layers(model):
            undo.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        yield seen


def _some_token(model: Any) -> int:
    """Any token but the first few, which are often padding."""
    return int(min(100, model.get_input_embeddings().weight.shape[0] - 1))
