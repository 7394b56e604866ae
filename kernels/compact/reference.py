"""What `compact` does, one slot at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import EXACT, LayerLayout
from kvcompile.kernels.transform import Transform


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
    sides = ((keys, new_keys, transform and transform.keys), (values, new_values, transform and transform.values))
    for stored, prompt, transforming in sides:
        for cls, token in zip(layout.classes, tokens, strict=True):
            for i, h in enumerate(range(cls.start, cls.start + cls.count)):
                for s in range(token.shape[1]):
                    vector = prompt[h, int(token[i, s])]
                    if (codec := stored.places[cls.start].codec) == EXACT:
                        stored.views(cls)[0][sequence, i, s] = vector
                        continue
                    if transforming is not None:
                        vector = transforming(vector[None, None], slice(h, h + 1))[0, 0]
                    codes, scales = codec_of(codec).load("reference").encode(vector)
                    stored.views(cls)[0][sequence, i, s] = torch.tensor(codes, dtype=torch.uint8)
                    stored.views(cls)[1][sequence, i, s] = torch.tensor(scales)
                    anchor = stored.anchor(cls)
                    if anchor is not None and s == 0:
                        anchor[sequence, i] = vector
