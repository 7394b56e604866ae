"""What `compact` does, one slot at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import EXACT, HeadClass, LayerLayout
from kvcompile.kernels.transform import Transform

Transforming = Callable[[torch.Tensor, slice], torch.Tensor]
"""Transforms vectors [count, T, D] of the heads at these storage positions."""


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
    sides = ((keys, new_keys, transform and transform.keys), (values, new_values, transform and transform.values))
    for stored, prompt, transforming in sides:
        for cls, token in zip(layout.classes, tokens, strict=True):
            for b in range(len(prompt)):
                for i, h in enumerate(range(cls.start, cls.start + cls.count)):
                    for s in range(min(token.shape[2], int(seen[b]))):
                        _fill(stored, cls, b, i, s, prompt[b, h, int(token[b, i, s])], transforming)


def _fill(
    stored: Buffers, cls: HeadClass, b: int, i: int, s: int, vector: torch.Tensor, transforming: Transforming | None
) -> None:
    """Slot s of head i of a class in sequence b."""
    if (codec := stored.places[cls.start].codec) == EXACT:
        stored.views(cls)[0][b, i, s] = vector
        return
    if transforming is not None:
        head = cls.start + i
        vector = transforming(vector[None, None], slice(head, head + 1))[0, 0]
    codes, scales = codec_of(codec).load("reference").encode(vector)
    stored.views(cls)[0][b, i, s] = torch.tensor(codes, dtype=torch.uint8)
    stored.views(cls)[1][b, i, s] = torch.tensor(scales)
    anchor = stored.anchor(cls)
    if anchor is not None and s == 0:
        anchor[b, i] = vector
