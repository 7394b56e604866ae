"""Which slot a token has: the arithmetic of sinks and rings, for all groups of a model at once.

Slots fill in the order of tokens; then token p of a head of C slots, the last r of them a ring, goes into slot
C - r + (p - C) mod r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcompile.export.onnx.builder import Builder
from kvcompile.export.onnx.groups import Group


@dataclass(frozen=True)
class Clock:
    """Counts of tokens of every sequence, int64 [B]: `seen` before this call and `total` after it; `longest` [1] is the
    largest of `seen`, and `length` [1] how many places for tokens the call has."""

    batch: int
    seen: str
    total: str
    longest: str
    length: str


@dataclass(frozen=True)
class Next:
    """Where one more token goes: `slot` int64 [B], and the slots `filled` afterwards, int64 [B]. For groups with heavy
    slots also `at`, the slot as the last of three indices int64 [B, 1, 1, 3]; `full` bool [B, 1, 1], whether it
    replaces something; and `other` int64 [B, 1, 1], some slot that is not this one."""

    slot: str
    filled: str
    at: str
    full: str
    other: str


def next_slots(b: Builder, groups: list[Group], clock: Clock) -> dict[tuple[int, int], Next]:
    """By capacity and ring, for all that occur."""
    shapes = sorted({(group.capacity, group.recent) for group in groups})
    table = np.array(shapes, np.int64)
    capacity, recent = (b.array(table[:, i, None].copy()) for i in (0, 1))
    seen = b.reshape(clock.seen, 1, clock.batch)
    over = b.op("Sub", seen, capacity)
    ring = b.op("Add", b.op("Mod", over, recent), b.op("Sub", capacity, recent))
    full = b.op("GreaterOrEqual", seen, capacity)
    slot = b.op("Where", full, ring, seen)
    filled = b.op("Min", b.op("Add", seen, b.ints(1)), capacity)
    other = b.cast(b.op("Equal", slot, b.ints(0)), "int64")
    at = b.op("Mul", b.reshape(slot, -1, 1, 1, 1), b.ints(0, 0, 1))
    sizes = [clock.batch] * len(shapes)
    flat = [b.reshape(slot, -1), b.reshape(filled, -1), at, b.reshape(full, -1, 1, 1), b.reshape(other, -1, 1, 1)]
    parts = [b.split(x, sizes, 0) for x in flat]
    return {shape: Next(*(part[i] for part in parts)) for i, shape in enumerate(shapes)}


def first_rows(batch: int, count: int) -> NDArray[np.int64]:
    """Indices [batch, count, 1, 3] of the first slot of every head."""
    rows = np.zeros((batch, count, 1, 3), np.int64)
    rows[..., 0] = np.arange(batch)[:, None, None]
    rows[..., 1] = np.arange(count)[:, None]
    return rows


def ring_slot(b: Builder, token: str, capacity: int, recent: int) -> str:
    """Slots of the tokens of these numbers."""
    ring = b.op("Add", b.op("Mod", b.op("Sub", token, b.ints(capacity)), b.ints(recent)), b.ints(capacity - recent))
    return b.op("Where", b.op("Less", token, b.ints(capacity)), token, ring)


def token_of_slot(b: Builder, count: str, slots: NDArray[np.int64], capacity: int, recent: int) -> str:
    """Numbers int64 [B, slots] of the tokens in these slots when `count` [B, 1] have come, none lost but to the ring;
    of slots that are not filled yet, the token that they will hold first."""
    slot = b.array(slots[None])
    oldest = b.op("Sub", count, b.ints(recent))
    ring = b.op("Add", oldest, b.op("Mod", b.op("Sub", slot, oldest), b.ints(recent)))
    wrapped = b.op("And", b.op("Greater", count, b.ints(capacity)), b.array(slots[None] >= capacity - recent))
    return b.op("Where", wrapped, ring, slot)
