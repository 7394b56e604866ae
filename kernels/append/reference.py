"""What `append` does, one head at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import EXACT, KINDS, OTHER, SCORED, HeadClass, LayerLayout


def append(
    keys: Buffers,
    values: Buffers,
    scores: torch.Tensor,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    score: torch.Tensor | None,
    seen: Sequence[int] | torch.Tensor,
) -> None:
    """See `api.append`."""
    for b, n in enumerate(int(n) for n in seen):
        for cls in layout.classes:
            if (kind := KINDS.get(cls.policy, OTHER)) == OTHER:
                continue
            for i, h in enumerate(range(cls.start, cls.start + cls.count)):
                slot = cls.ring_slot(n)
                if kind == SCORED and score is not None:
                    first = layout.rows[h].score
                    held = scores[b, first : first + cls.capacity]
                    heavy = range(cls.sink, cls.capacity - cls.recent)
                    # Of equally low ones the last: of equal scores the one in the lower slot stays.
                    victim = min(heavy, key=lambda s, held=held: (held[s].item(), -s), default=slot)
                    if n >= cls.capacity and held[slot] > held[victim]:
                        held[victim] = held[slot]
                        for view in keys.views(cls) + values.views(cls):
                            view[b, i, victim] = view[b, i, slot]
                    held[slot] = score[b, h].half()
                for stored, new in ((keys, new_keys[b, h]), (values, new_values[b, h])):
                    _write(stored, cls, b, i, slot, new)


def _write(stored: Buffers, cls: HeadClass, b: int, i: int, slot: int, new: torch.Tensor) -> None:
    codec = stored.places[cls.start].codec
    if codec == EXACT:
        stored.views(cls)[0][b, i, slot] = new.to(stored.exact.dtype)
        return
    codes, scales = codec_of(codec).load("reference").encode(new)
    stored.views(cls)[0][b, i, slot] = torch.tensor(codes, dtype=torch.uint8)
    stored.views(cls)[1][b, i, slot] = torch.tensor(scales)
    anchor = stored.anchor(cls)
    if anchor is not None and slot == 0:
        anchor[b, i] = new.to(anchor.dtype)
