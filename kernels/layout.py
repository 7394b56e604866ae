"""How the heads of one layer lie in its flat store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class HeadClass:
    """`count` neighbouring heads of equal shape: storage positions [start, start + count), each with `capacity` slots
    (`sink` first and `recent` last ones protected), the first of them at slot `offset` of the layer's store."""

    policy: str
    start: int
    count: int
    capacity: int
    sink: int
    recent: int
    offset: int

    @property
    def slots(self) -> int:
        """Slots of all heads of the class."""
        return self.count * self.capacity

    def ring_slot(self, token: int) -> int:
        """Slot of the token of this number: slots fill in order, then the last `recent` ones are a ring."""
        if token < self.capacity:
            return token
        return self.capacity - self.recent + (token - self.capacity) % self.recent

    def view(self, store: torch.Tensor) -> torch.Tensor:
        """The class's part [B, count, capacity, D] of a layer's store [B, slots, D]; no copy."""
        return store.narrow(1, self.offset, self.slots).unflatten(1, (self.count, self.capacity))


@dataclass(frozen=True)
class LayerLayout:
    """The classes of one layer in storage order, and the width of its sliding window in tokens (0: none)."""

    classes: tuple[HeadClass, ...]
    window: int = 0

    @classmethod
    def from_heads(cls, heads: Sequence[tuple[str, int, int, int]], window: int = 0) -> LayerLayout:
        """Lay out heads given in storage order as (policy, capacity, sink, recent); equal neighbours form a class."""
        classes: list[HeadClass] = []
        offset = 0
        for position, (policy, capacity, sink, recent) in enumerate(heads):
            last = classes[-1] if classes else None
            if last and (last.policy, last.capacity, last.sink, last.recent) == (policy, capacity, sink, recent):
                classes[-1] = HeadClass(policy, last.start, last.count + 1, capacity, sink, recent, last.offset)
            else:
                classes.append(HeadClass(policy, position, 1, capacity, sink, recent, offset))
            offset += capacity
        return cls(tuple(classes), window)

    @cached_property
    def num_kv_heads(self) -> int:
        return sum(c.count for c in self.classes)

    @cached_property
    def slots(self) -> int:
        """Slots of all heads of the layer."""
        return sum(c.slots for c in self.classes)
