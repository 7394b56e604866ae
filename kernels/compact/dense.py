"""`compact` in torch, class by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvcompile.kernels.buffers import Stored
from kvcompile.kernels.layout import HeadClass, LayerLayout
from kvcompile.kernels.quantise.api import encode
from kvcompile.kernels.transform import Turn

Turning = Callable[[torch.Tensor, slice], torch.Tensor]


def compact(
    keys: Stored,
    values: Stored,
    layout: LayerLayout,
    sequence: int,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    turn: Turn | None,
) -> None:
    """See `api.compact`."""
    for cls, token in zip(layout.classes, tokens, strict=True):
        _fill(keys, cls, sequence, new_keys[cls.heads], token, None if turn is None else turn.keys)
        _fill(values, cls, sequence, new_values[cls.heads], token, None if turn is None else turn.values)


def _fill(
    stored: Stored, cls: HeadClass, sequence: int, prompt: torch.Tensor, token: torch.Tensor, turn: Turning | None
) -> None:
    kept = prompt.gather(1, token.unsqueeze(2).expand(*token.shape, prompt.shape[2]))
    width = stored.places[cls.start].width
    if width and turn is not None:
        kept = turn(kept, cls.heads)
    for view, part in zip(stored.views(cls), encode(kept, width) if width else (kept,), strict=True):
        view[sequence, :, : kept.shape[1]] = part
    anchor = stored.anchor(cls)
    if anchor is not None and kept.shape[1]:
        anchor[sequence] = kept[:, 0].to(anchor.dtype)
