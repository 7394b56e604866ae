"""Caches in the pages of an engine: one page is one sequence, all layers and heads of it at fixed offsets.

A compiled cache has a fixed size, so an engine that gives every sequence one block of memory needs no more: block i of
its pool is page i. The kernels are given where a sequence is (`places`), and nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcompile.kernels import LayerLayout, Transform
from kvcompile.kernels.regions import WIDEST
from kvcompile.runtime.rotation import Rotation
from kvcompile.runtime.store import LayerStore

ALIGN = WIDEST
"""Bytes that a buffer's place in a page is a multiple of, as loads of the kernels are this wide."""
PAGE_ALIGN = 128
"""The same of the size of a page."""


@dataclass(frozen=True)
class PageLayout:
    """Where the buffers of every layer lie in a page."""

    layers: tuple[LayerLayout, ...]
    head_dim: int
    dtype: torch.dtype
    offsets: tuple[int, ...]
    """The first byte of every layer."""
    used: int
    """Bytes of a page that hold something, gaps included."""
    nbytes: int
    """Bytes of a page."""

    @classmethod
    def of(cls, layers: Sequence[LayerLayout], head_dim: int, dtype: torch.dtype, least: int = 0) -> PageLayout:
        """The smallest page for these layers, of `least` bytes or more: of tensor-parallel ranks all have the largest
        one's."""
        offsets, end = [], 0
        for layout in layers:
            offsets.append(end)
            end = _store(layout, head_dim, dtype, _Carving(None, end)).offset
        # The next sequence is a whole number of exact rows further on.
        step = math.lcm(PAGE_ALIGN, head_dim * dtype.itemsize)
        return cls(tuple(layers), head_dim, dtype, tuple(offsets), end, -(-max(end, least) // step) * step)

    def part(self, layer: int) -> slice:
        """A layer's bytes of a page."""
        return slice(self.offsets[layer], (*self.offsets, self.used)[layer + 1])

    def store(
        self, layer: int, pool: torch.Tensor, transform: Transform | None, rotation: Rotation | None = None
    ) -> LayerStore:
        """One layer of all pages: views of `pool`, int8 [pages, nbytes]."""
        carving = _Carving(pool, self.offsets[layer])
        return _store(self.layers[layer], self.head_dim, self.dtype, carving, transform, rotation).store


@dataclass
class _Carving:
    """Cuts the buffers of stores out of pages, one after the other; without a pool it only counts."""

    pool: torch.Tensor | None
    offset: int

    def __call__(self, batch: int, rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        nbytes, first = rows * size * dtype.itemsize, self.offset
        self.offset += -(-nbytes // ALIGN) * ALIGN
        if self.pool is None or not nbytes:
            device = "meta" if self.pool is None else self.pool.device
            return torch.empty(batch, rows, size, dtype=dtype, device=device)
        return self.pool[:, first : first + nbytes].view(dtype).unflatten(1, (rows, size))


@dataclass(frozen=True)
class _Carved:
    store: LayerStore
    offset: int


def _store(
    layout: LayerLayout,
    head_dim: int,
    dtype: torch.dtype,
    carving: _Carving,
    transform: Transform | None = None,
    rotation: Rotation | None = None,
) -> _Carved:
    pages, device = (1, torch.device("meta")) if carving.pool is None else (len(carving.pool), carving.pool.device)
    store = LayerStore(layout, head_dim, dtype, device, pages, transform, carving, rotation)
    return _Carved(store, carving.offset)
