"""What `append` does, one head at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels.buffers import Stored
from kvcompile.kernels.layout import KINDS, OTHER, SCORED, LayerLayout
from kvcompile.kernels.quantise import reference as quantise


def append(
    keys: Stored,
    values: Stored,
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
                    heavy = held[cls.sink : cls.capacity - cls.recent].tolist()
                    if n >= cls.capacity and heavy and held[slot] > min(heavy):
                        victim = cls.sink + heavy.index(min(heavy))
                        held[victim] = held[slot]
                        for view in keys.views(cls) + values.views(cls):
                            view[b, i, victim] = view[b, i, slot]
                    held[slot] = score[b, h].half()
                for stored, new in ((keys, new_keys[b, h]), (values, new_values[b, h])):
                    _write(stored, stored.places[cls.start].width, cls, b, i, slot, new)


def _write(stored: Stored, width: int, cls, b: int, i: int, slot: int, new: torch.Tensor) -> None:
    if not width:
        stored.views(cls)[0][b, i, slot] = new.to(stored.exact.dtype)
        return
    codes, scales = quantise.encode(new, width)
    stored.views(cls)[0][b, i, slot] = torch.tensor(codes, dtype=torch.uint8)
    stored.views(cls)[1][b, i, slot] = torch.tensor(scales)
    anchor = stored.anchor(cls)
    if anchor is not None and slot == 0:
        anchor[b, i] = new.to(anchor.dtype)
