"""The keys, or the values, of one layer for a batch, each head in its own codec or in the cache dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch

from kvcompile.kernels.codecs.api import decode, encode
from kvcompile.kernels.layout import EXACT, HeadClass, LayerLayout, side_places
from kvcompile.kernels.overwrite.api import overwrite
from kvcompile.kernels.regions import regions

Make = Callable[[int, int, int, torch.dtype], torch.Tensor]
"""Makes a tensor [batch, rows, size] of this dtype, all zero: `make(batch, rows, size, dtype)`."""


class Buffers:
    """A row for every slot; heads lie end to end, in storage order.

    `exact` [batch, rows, D] holds the heads of the cache dtype; `codes` uint8 [batch, bytes] and `scales` float16
    [batch, numbers] hold those that are quantised, codec by codec (`regions`; `parts` has them as rows), and `anchors`
    [batch, heads, D] a copy of token 0 in the cache dtype for those of them that have a sink. What quantised heads hold
    has been transformed before (`Transform`). All memory is allocated here, once; by `make` where it is given: a
    sequence's part of a tensor has to be contiguous, and the next one's to begin a multiple of its rows further on, of
    codes and scales a multiple of `regions.WIDEST` bytes.
    """

    def __init__(
        self,
        layout: LayerLayout,
        bits: Sequence[int],
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        make: Make | None = None,
    ) -> None:
        self.head_dim = head_dim
        places = side_places(layout, bits)
        self.places = {cls.start: places[cls.start] for cls in layout.classes}
        self.regions = regions(layout, bits, head_dim)
        exact = sum(cls.slots for cls in layout.classes if self.places[cls.start].codec == EXACT)
        anchors = sum(place.anchor >= 0 for place in places)

        def zeros(count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
            if make is not None:
                return make(batch, count, size, dtype)
            return torch.zeros(batch, count, size, dtype=dtype, device=device)

        self.exact = zeros(exact, head_dim, dtype)
        self.codes = zeros(sum(r.rows * r.code_bytes for r in self.regions.values()), 1, torch.uint8).flatten(1)
        self.scales = zeros(sum(r.rows * r.groups for r in self.regions.values()), 1, torch.float16).flatten(1)
        self.anchors = zeros(anchors, head_dim, dtype)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that holds something."""
        yield from (t for t in self._every() if t.numel())

    def _every(self) -> Iterator[torch.Tensor]:
        yield from (self.exact, self.codes, self.scales, self.anchors)

    def parts(self, codec: int) -> tuple[torch.Tensor, ...]:
        """What a slot of this codec consists of, [batch, rows, X] each and no copies: its codes and scales, or its
        vector."""
        if codec == EXACT:
            return (self.exact,)
        rows, code_bytes, groups, codes, scales = self.regions[codec]
        return (
            self.codes.narrow(1, codes, rows * code_bytes).unflatten(1, (rows, code_bytes)),
            self.scales.narrow(1, scales, rows * groups).unflatten(1, (rows, groups)),
        )

    def views(self, cls: HeadClass) -> list[torch.Tensor]:
        """What a class has for every slot, [B, count, capacity, X] each and no copies: its vectors, or its codes and
        its scales."""
        place = self.places[cls.start]
        return [
            flat.narrow(1, place.row, cls.slots).unflatten(1, (cls.count, cls.capacity))
            for flat in self.parts(place.codec)
        ]

    def anchor(self, cls: HeadClass) -> torch.Tensor | None:
        """The exact copies [B, count, D] of a quantised class's first slot, or None."""
        first = self.places[cls.start].anchor
        return None if first < 0 else self.anchors.narrow(1, first, cls.count)

    def read(self, cls: HeadClass, filled: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `filled` slots of a class as vectors [B, count, filled, D]."""
        parts = [view[:, :, :filled] for view in self.views(cls)]
        if (codec := self.places[cls.start].codec) == EXACT:
            return parts[0].to(dtype)
        vectors = decode(parts[0], parts[1], codec, dtype)
        anchor = self.anchor(cls)
        if anchor is not None and filled:
            vectors[:, :, 0] = anchor.to(dtype)
        return vectors

    def write(
        self, cls: HeadClass, new: torch.Tensor, slot: torch.Tensor, source: torch.Tensor, to: torch.Tensor
    ) -> None:
        """Move what is in slots `source` int64 [B, count, M] to slots `to` (-1: nowhere), then put `new`
        [B, count, T, D] into `slot` int64 [B, count, T] (-1: dropped)."""
        for view, part in zip(self.views(cls), as_stored(new, self.places[cls.start].codec), strict=True):
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
        self._change(lambda tensor: tensor.index_select(0, index))

    def at(self, index: torch.Tensor) -> Buffers:
        """A copy of the sequences at `index`."""
        found = copy.copy(self)
        found.take(index)
        return found

    def one(self, sequence: int) -> Buffers:
        """One sequence, a view."""
        found = copy.copy(self)
        found._change(lambda tensor: tensor.narrow(0, sequence, 1))
        return found

    def put(self, index: torch.Tensor, other: Buffers) -> None:
        """Overwrite the sequences at `index` with those of `other`."""
        for tensor, new in zip(self._every(), other._every(), strict=True):
            tensor.index_copy_(0, index.long(), new)

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `change(tensor)` in the place of every tensor."""
        self.exact, self.codes = change(self.exact), change(self.codes)
        self.scales, self.anchors = change(self.scales), change(self.anchors)


def as_stored(vectors: torch.Tensor, codec: int) -> tuple[torch.Tensor, ...]:
    """Vectors [..., D] as the parts of slots: codes and scales, or the vectors themselves where `codec` is EXACT."""
    return (vectors,) if codec == EXACT else encode(vectors, codec)
