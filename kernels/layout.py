"""How the heads of one layer lie in its store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

QUANTISED = (4, 8)
"""Widths in bits at which keys or values are rounded; every other width is the cache's own type."""


@dataclass(frozen=True)
class HeadSpec:
    """One head as an artifact describes it, in tokens and bits."""

    policy: str
    capacity: int
    sink: int
    recent: int
    k_bits: int = 16
    v_bits: int = 16


@dataclass(frozen=True)
class HeadClass:
    """`count` neighbouring heads of equal shape: storage positions [start, start + count), each with `capacity` slots
    (`sink` first and `recent` last ones protected)."""

    policy: str
    start: int
    count: int
    capacity: int
    sink: int
    recent: int
    k_bits: int = 16
    v_bits: int = 16

    @property
    def slots(self) -> int:
        """Slots of all heads of the class."""
        return self.count * self.capacity

    @property
    def heads(self) -> slice:
        """Storage positions of its heads."""
        return slice(self.start, self.start + self.count)

    def ring_slot(self, token: int) -> int:
        """Slot of the token of this number: slots fill in order, then the last `recent` ones are a ring."""
        if token < self.capacity:
            return token
        return self.capacity - self.recent + (token - self.capacity) % self.recent


@dataclass(frozen=True)
class LayerLayout:
    """The classes of one layer in storage order, and the width of its sliding window in tokens (0: none)."""

    classes: tuple[HeadClass, ...]
    window: int = 0

    @classmethod
    def from_heads(cls, heads: Sequence[HeadSpec], window: int = 0) -> LayerLayout:
        """Lay out heads given in storage order; equal neighbours form a class."""
        classes: list[HeadClass] = []
        previous: HeadSpec | None = None
        for position, head in enumerate(heads):
            if head == previous:
                classes[-1] = replace(classes[-1], count=classes[-1].count + 1)
            else:
                classes.append(HeadClass(start=position, count=1, **vars(head)))
            previous = head
        return cls(tuple(classes), window)

    @cached_property
    def num_kv_heads(self) -> int:
        return sum(c.count for c in self.classes)

    @cached_property
    def slots(self) -> int:
        """Slots of all heads of the layer."""
        return sum(c.slots for c in self.classes)
