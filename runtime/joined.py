"""Several linear layers with the same input as one product, without a copy of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

JOINED = "_kvcompile_joined"
"""Attribute of layers whose weights are views of others' storage."""
Linear = tuple[torch.Tensor, torch.Tensor | None]
"""A weight [out, in] and a bias [out]."""


def joined(layers: Sequence[nn.Linear]) -> Linear:
    """Their weights and biases as one: the rows of the first layer, then those of the next. The layers keep theirs as
    views of it, so that what they compute stays the same and nothing is stored twice."""
    bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers])
    for layer in layers if len(layers) > 1 else ():
        setattr(layer, JOINED, True)
    return _joined([layer.weight for layer in layers]), bias


def separate(layers: Iterable[nn.Linear]) -> None:
    """Give every layer weights of its own again, bit for bit."""
    for layer in layers:
        if not hasattr(layer, JOINED):
            continue
        delattr(layer, JOINED)
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.data = parameter.data.clone()


def joinable(layers: Sequence[nn.Module]) -> bool:
    """Whether they are plain linear layers of one kind, with weights that are there."""
    if any(type(layer) is not nn.Linear for layer in layers):
        return False
    weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
    same = {(w.device, w.dtype, w.shape[1]) for w in weights}
    biased = {layer.bias is None for layer in layers}
    return len(same) == len(biased) == 1 and weights[0].is_floating_point() and not weights[0].is_meta


def _joined(parts: Sequence[nn.Parameter]) -> torch.Tensor:
    rows = sum(len(part) for part in parts)
    first = parts[0].data
    # Weights made in inference mode could not be changed outside of it ever after: they stay of the kind that they are.
    with torch.inference_mode(parts[0].is_inference()), torch.no_grad():
        if not _side_by_side(parts):
            first = torch.cat([part.data for part in parts])
            for part, view in zip(parts, first.split([len(part) for part in parts]), strict=True):
                part.data = view
        return first.as_strided((rows, *first.shape[1:]), first.stride())


def _side_by_side(parts: Sequence[nn.Parameter]) -> bool:
    """Whether they lie one after the other in one storage, as after an earlier call."""
    storage, place = parts[0].untyped_storage().data_ptr(), parts[0].data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.data_ptr() != place or not part.is_contiguous():
            return False
        place += part.nbytes
    return True
