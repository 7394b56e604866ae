"""What `compact` does, one slot at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels.buffers import Stored
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.quantise import reference as quantise
from kvcompile.kernels.transform import Turn


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
    sides = ((keys, new_keys, turn and turn.keys), (values, new_values, turn and turn.values))
    for stored, prompt, turning in sides:
        for cls, token in zip(layout.classes, tokens, strict=True):
            for i, h in enumerate(range(cls.start, cls.start + cls.count)):
                for s in range(token.shape[1]):
                    vector = prompt[h, int(token[i, s])]
                    if not (width := stored.places[cls.start].width):
                        stored.views(cls)[0][sequence, i, s] = vector
                        continue
                    if turning is not None:
                        vector = turning(vector[None, None], slice(h, h + 1))[0, 0]
                    codes, scales = quantise.encode(vector, width)
                    stored.views(cls)[0][sequence, i, s] = torch.tensor(codes, dtype=torch.uint8)
                    stored.views(cls)[1][sequence, i, s] = torch.tensor(scales)
                    anchor = stored.anchor(cls)
                    if anchor is not None and s == 0:
                        anchor[sequence, i] = vector
