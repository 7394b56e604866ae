"""The keys, or the values, of one layer for a batch, each head in its own width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from kvcompile.kernels.layout import QUANTISED, HeadClass, LayerLayout, side_places
from kvcompile.kernels.overwrite.api import overwrite
from kvcompile.kernels.quantise.api import decode, encode, groups

Turning = Callable[[torch.Tensor, slice], torch.Tensor]
"""Turns vectors [count, T, D] of the heads at these storage positions."""


class Stored:
    """A row for every slot, in one flat buffer a width and sequence; heads lie end to end, in storage order.

    `exact` [batch, rows, D] holds the heads of the cache's own type; `codes[w]` uint8 [batch, rows, D * w / 8] and
    `scales[w]` float16 [batch, rows, groups] those rounded to w bits, and `anchors` [batch, heads, D] an exact copy of
    token 0 for those of them that have a sink. What rounded heads hold has been turned before (`turn`). All memory is
    allocated here, once.
    """

    def __init__(
        self,
        layout: LayerLayout,
        bits: Sequence[int],
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
    ) -> None:
        self.head_dim = head_dim
        places = side_places(layout, bits)
        self.places = {cls.start: places[cls.start] for cls in layout.classes}
        rows = dict.fromkeys((0, *QUANTISED), 0)
        for cls in layout.classes:
            rows[self.places[cls.start].width] += cls.slots
        anchors = sum(place.anchor >= 0 for place in places)

        def zeros(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(batch, count, width, dtype=dtype, device=device)

        self.exact = zeros(rows[0], head_dim, dtype)
        self.codes = {w: zeros(rows[w], head_dim * w // 8, torch.uint8) for w in QUANTISED}
        self.scales = {w: zeros(rows[w], groups(head_dim), torch.float16) for w in QUANTISED}
        self.anchors = zeros(anchors, head_dim, dtype)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that holds something."""
        every = (self.exact, *self.codes.values(), *self.scales.values(), self.anchors)
        yield from (t for t in every if t.numel())

    def views(self, cls: HeadClass) -> list[torch.Tensor]:
        """What a class has for every slot, [B, count, capacity, X] each and no copies: its vectors, or its codes and
        its scales."""
        place = self.places[cls.start]
        buffers = [self.codes[place.width], self.scales[place.width]] if place.width else [self.exact]
        return [flat.narrow(1, place.row, cls.slots).unflatten(1, (cls.count, cls.capacity)) for flat in buffers]

    def anchor(self, cls: HeadClass) -> torch.Tensor | None:
        """The exact copies [B, count, D] of a rounded class's first slot, or None."""
        first = self.places[cls.start].anchor
        return None if first < 0 else self.anchors.narrow(1, first, cls.count)

    def read(self, cls: HeadClass, filled: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `filled` slots of a class as vectors [B, count, filled, D]."""
        parts = [view[:, :, :filled] for view in self.views(cls)]
        if not (width := self.places[cls.start].width):
            return parts[0].to(dtype)
        vectors = decode(parts[0], parts[1], width, dtype)
        anchor = self.anchor(cls)
        if anchor is not None and filled:
            vectors[:, :, 0] = anchor.to(dtype)
        return vectors

    def write(
        self, cls: HeadClass, new: torch.Tensor, slot: torch.Tensor, source: torch.Tensor, to: torch.Tensor
    ) -> None:
        """Move what is in slots `source` int64 [B, count, M] to slots `to` (-1: nowhere), then put `new`
        [B, count, T, D] into `slot` int64 [B, count, T] (-1: dropped)."""
        width = self.places[cls.start].width
        for view, part in zip(self.views(cls), encode(new, width) if width else (new,), strict=True):
            if source.shape[2]:
                index = source.clamp(min=0).unsqueeze(3).expand(-1, -1, -1, view.shape[3])
                overwrite(view, view.gather(2, index), to)
            overwrite(view, part, slot)

    def write_anchor(self, cls: HeadClass, new: torch.Tensor, slot: torch.Tensor) -> None:
        """Keep an exact copy of what `write` has put into slot 0, which is token 0 and no other."""
        anchor = self.anchor(cls)
        if anchor is not None:
            first = (slot == 0).unsqueeze(3)
            anchor.copy_(torch.where(first.any(2), (new * first).sum(2).to(anchor.dtype), anchor))

    def take(self, index: torch.Tensor) -> None:
        """Make the batch the sequences at `index`."""
        self.exact, self.anchors = self.exact.index_select(0, index), self.anchors.index_select(0, index)
        for buffers in (self.codes, self.scales):
            for width in buffers:
                buffers[width] = buffers[width].index_select(0, index)
