"""`compact` in torch, class by class. Slots that a short prompt leaves empty are written like the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvcompile.kernels.buffers import Buffers, as_stored
from kvcompile.kernels.layout import EXACT, HeadClass, LayerLayout
from kvcompile.kernels.transform import Transform

Transforming = Callable[[torch.Tensor, slice], torch.Tensor]
"""Transforms vectors [B, count, T, D] of the heads at these storage positions."""


def compact(
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    seen: Sequence[int] | torch.Tensor,
    transform: Transform | None,
) -> None:
    """See `api.compact`."""
    for cls, token in zip(layout.classes, tokens, strict=True):
        _fill(keys, cls, new_keys[:, cls.heads], token, None if transform is None else transform.keys)
        _fill(values, cls, new_values[:, cls.heads], token, None if transform is None else transform.values)


def _fill(
    stored: Buffers,
    cls: HeadClass,
    prompt: torch.Tensor,
    token: torch.Tensor,
    transforming: Transforming | None,
) -> None:
    kept = prompt.gather(2, token.unsqueeze(3).expand(*token.shape, prompt.shape[3]))
    codec = stored.places[cls.start].codec
    if codec != EXACT and transforming is not None:
        kept = transforming(kept, cls.heads)
    for view, part in zip(stored.views(cls), as_stored(kept, codec), strict=True):
        view[:, :, : kept.shape[2]] = part
    anchor = stored.anchor(cls)
    if anchor is not None and kept.shape[2]:
        anchor.copy_(kept[:, :, 0])
