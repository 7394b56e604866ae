"""`compact` in torch, class by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvcompile.kernels.buffers import Buffers, as_stored
from kvcompile.kernels.layout import EXACT, HeadClass, LayerLayout
from kvcompile.kernels.transform import Transform

Transforming = Callable[[torch.Tensor, slice], torch.Tensor]
"""Transforms vectors [count, T, D] of the heads at these storage positions."""


def compact(
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    sequence: int,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    transform: Transform | None,
) -> None:
    """See `api.compact`."""
    for cls, token in zip(layout.classes, tokens, strict=True):
        _fill(keys, cls, sequence, new_keys[cls.heads], token, None if transform is None else transform.keys)
        _fill(values, cls, sequence, new_values[cls.heads], token, None if transform is None else transform.values)


def _fill(
    stored: Buffers,
    cls: HeadClass,
    sequence: int,
    prompt: torch.Tensor,
    token: torch.Tensor,
    transforming: Transforming | None,
) -> None:
    kept = prompt.gather(1, token.unsqueeze(2).expand(*token.shape, prompt.shape[2]))
    codec = stored.places[cls.start].codec
    if codec != EXACT and transforming is not None:
        kept = transforming(kept, cls.heads)
    for view, part in zip(stored.views(cls), as_stored(kept, codec), strict=True):
        view[sequence, :, : kept.shape[1]] = part
    anchor = stored.anchor(cls)
    if anchor is not None and kept.shape[1]:
        anchor[sequence] = kept[:, 0].to(anchor.dtype)
