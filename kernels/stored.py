"""The keys, or the values, of one layer for a batch, each head in its own width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from kvcompile.kernels.append.api import append
from kvcompile.kernels.compact.api import compact
from kvcompile.kernels.layout import QUANTISED, HeadClass, LayerLayout
from kvcompile.kernels.quantise.api import decode, encode, groups

Turning = Callable[[torch.Tensor, slice], torch.Tensor]
"""Turns vectors [count, T, D] of the heads at these storage positions."""


class Stored:
    """Flat buffers, heads laid end to end in storage order: `exact` [batch, slots, D] holds the classes of the cache's
    own type; `codes` uint8 and `scales` float16 [batch, ...] those that are rounded, and `anchors` [batch, heads, D]
    an exact copy of token 0 for those of them that have a sink. What rounded classes hold has been turned before
    (`turn`). All memory is allocated here, once.
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
        self._bits = {c.start: b if b in QUANTISED else 0 for c, b in zip(layout.classes, bits, strict=True)}
        self._first: dict[int, tuple[int, int, int, int]] = {}  # where a class begins in each buffer
        exact = codes = scales = anchors = 0
        for cls in layout.classes:
            self._first[cls.start] = (exact, codes, scales, anchors)
            if width := self._bits[cls.start]:
                codes += cls.slots * head_dim * width // 8
                scales += cls.slots * groups(head_dim)
                anchors += cls.count * min(cls.sink, 1)
            else:
                exact += cls.slots
        self.exact = torch.zeros(batch, exact, head_dim, dtype=dtype, device=device)
        self.codes = torch.zeros(batch, codes, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(batch, scales, dtype=torch.float16, device=device)
        self.anchors = torch.zeros(batch, anchors, head_dim, dtype=dtype, device=device)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that holds something."""
        yield from (t for t in (self.exact, self.codes, self.scales, self.anchors) if t.numel())

    def views(self, cls: HeadClass) -> list[torch.Tensor]:
        """What a class has for every slot, [B, count, capacity, X] each and no copies: its vectors, or its codes and
        its scales."""
        exact, codes, scales, _ = self._first[cls.start]
        if not (bits := self._bits[cls.start]):
            return [self.exact.narrow(1, exact, cls.slots).unflatten(1, (cls.count, cls.capacity))]
        shapes = ((self.codes, codes, self.head_dim * bits // 8), (self.scales, scales, groups(self.head_dim)))
        return [
            flat.narrow(1, first, cls.slots * width).unflatten(1, (cls.count, cls.capacity, width))
            for flat, first, width in shapes
        ]

    def anchor(self, cls: HeadClass) -> torch.Tensor | None:
        """The exact copies [B, count, D] of a rounded class's first slot, or None."""
        if not self._bits[cls.start] or not cls.sink:
            return None
        return self.anchors.narrow(1, self._first[cls.start][3], cls.count)

    def read(self, cls: HeadClass, filled: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `filled` slots of a class as vectors [B, count, filled, D]."""
        parts = [view[:, :, :filled] for view in self.views(cls)]
        if not (bits := self._bits[cls.start]):
            return parts[0].to(dtype)
        vectors = decode(parts[0], parts[1], bits, dtype)
        anchor = self.anchor(cls)
        if anchor is not None and filled:
            vectors[:, :, 0] = anchor.to(dtype)
        return vectors

    def fill(
        self, cls: HeadClass, b: int, prompt: torch.Tensor, token: torch.Tensor, turn: Turning = lambda kept, _: kept
    ) -> None:
        """Sequence `b` of a class keeps of its prompt [count, n, D] the tokens `token` int64 [count, kept], in the
        order of slots; for a rounded class, what is kept is turned on the way."""
        if not (bits := self._bits[cls.start]):
            compact(self.views(cls)[0][b], prompt, token)
            return
        kept = turn(prompt.gather(1, token.unsqueeze(2).expand(-1, -1, prompt.shape[2])), cls.heads)
        for view, part in zip(self.views(cls), encode(kept, bits), strict=True):
            view[b, :, : kept.shape[1]] = part
        anchor = self.anchor(cls)
        if anchor is not None and kept.shape[1]:
            anchor[b] = kept[:, 0].to(anchor.dtype)

    def write(
        self, cls: HeadClass, new: torch.Tensor, slot: torch.Tensor, source: torch.Tensor, to: torch.Tensor
    ) -> None:
        """Move what is in slots `source` int64 [B, count, M] to slots `to` (-1: nowhere), then put `new`
        [B, count, T, D] into `slot` int64 [B, count, T] (-1: dropped)."""
        bits = self._bits[cls.start]
        for view, part in zip(self.views(cls), encode(new, bits) if bits else (new,), strict=True):
            if source.shape[2]:
                index = source.clamp(min=0).unsqueeze(3).expand(-1, -1, -1, view.shape[3])
                append(view, view.gather(2, index), to)
            append(view, part, slot)

    def write_anchor(self, cls: HeadClass, new: torch.Tensor, slot: torch.Tensor) -> None:
        """Keep an exact copy of what `write` has put into slot 0, which is token 0 and no other."""
        anchor = self.anchor(cls)
        if anchor is not None:
            first = (slot == 0).unsqueeze(3)
            anchor.copy_(torch.where(first.any(2), (new * first).sum(2).to(anchor.dtype), anchor))

    def take(self, index: torch.Tensor) -> None:
        """Make the batch the sequences at `index`."""
        for name in ("exact", "codes", "scales", "anchors"):
            setattr(self, name, getattr(self, name).index_select(0, index))
