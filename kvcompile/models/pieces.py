"""A few numbers of a streamed model's weights, read where they lie in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from kvcompile.models.streamed import Loader

Sampler = Callable[[str, list[int]], NDArray[np.float32]]
"""Gives some elements of a tensor of the state dict, by its name and their places in its flat order, as f32."""

_samplers: WeakKeyDictionary[nn.Module, Sampler] = WeakKeyDictionary()


def register_sampler(model: nn.Module, sampler: Sampler) -> None:
    """Have `sampler` give what it is asked for of a model."""
    _samplers[model] = sampler


def sampler(model: Any) -> Sampler | None:
    """How to see a few numbers of a streamed model's weights; None for a model that is held whole."""
    return _samplers.get(model)


def sample(loader: Loader, key: str, places: list[int]) -> NDArray[np.float32]:
    """Some elements of a tensor of the state dict."""
    empty = loader.empty[key]
    source = _stored(loader, empty)
    if source is None:
        return loader.load([empty])[id(empty)].reshape(-1)[places].float().cpu().numpy()
    return loader.checkpoint.elements(source, places).to(empty.dtype).float().numpy()


def rows(loader: Loader, empty: nn.Parameter, ids: Tensor, own: slice) -> Tensor:
    """Columns `own` of the rows `ids` int64 [...] of a matrix that has no numbers in the model, [..., columns]."""
    source = _stored(loader, empty)
    if source is None:
        return loader.load([empty])[id(empty)][ids, own]
    which, places = torch.unique(ids.flatten().cpu(), return_inverse=True)
    count, starts = own.stop - own.start, which * empty.shape[1] + own.start
    found = loader.checkpoint.elements(source, starts.tolist(), count).view(-1, count)[places]
    return found.to(loader.device, empty.dtype).view(*ids.shape, count)


def _stored(loader: Loader, empty: nn.Parameter) -> str | None:
    """The tensor of the checkpoint that a parameter is, None where it is made of several or of parts."""
    found = (loader.stored(name) for name in loader.names[id(empty)])
    return next((source for source in found if source is not None), None)
