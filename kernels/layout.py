"""How the heads of one layer lie in its store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from kvcompile.kernels.codecs import codec_of, is_quantised

EXACT = 0
"""In place of a codec's id: rows in the cache dtype."""


@dataclass(frozen=True)
class HeadSpec:
    """One head as an artifact describes it, in tokens, and for keys and values in bits: the id of a codec, or the bits
    of the cache dtype."""

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


class Place(NamedTuple):
    """Where a head lies on one side (keys or values): the id of its `codec` (0: the cache dtype), the first of its rows
    among those of that codec (`regions.starts` has their bytes), and its anchor (-1: it has none)."""

    codec: int
    row: int
    anchor: int


class HeadRow(NamedTuple):
    """One head for the kernels, in storage order. `kind` is one of RING, SCORED and OTHER; `score` is the first row of
    its scores (-1: it has none), `slot` the first of its slots when all slots of the layer are counted through."""

    capacity: int
    sink: int
    recent: int
    kind: int
    score: int
    slot: int
    k_codec: int
    k_row: int
    k_anchor: int
    v_codec: int
    v_row: int
    v_anchor: int


RING, SCORED, OTHER = 0, 1, 2
"""How a head chooses the slot of a new token: by a ring alone, by a ring and scores, or in a way of its own."""
KINDS = {"full": RING, "recent": RING, "snapkv": RING, "scored": SCORED}


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

    @cached_property
    def scored_slots(self) -> int:
        """Slots of its heads that keep scores."""
        return sum(c.slots for c in self.classes if KINDS.get(c.policy) == SCORED)

    @cached_property
    def codecs(self) -> frozenset[int]:
        """Ids of the codecs that its heads' keys or values are stored with."""
        return frozenset().union(*self.side_codecs)

    @cached_property
    def side_codecs(self) -> tuple[frozenset[int], frozenset[int]]:
        """Those of keys, and those of values."""
        return (
            frozenset(c.k_bits for c in self.classes if is_quantised(c.k_bits)),
            frozenset(c.v_bits for c in self.classes if is_quantised(c.v_bits)),
        )

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What implementations derive from the layout once, under keys of their own."""
        return {}

    @cached_property
    def rows(self) -> tuple[HeadRow, ...]:
        """Every head, in storage order."""
        rows, slot, score = [], 0, 0
        sides = [side_places(self, [getattr(c, name) for c in self.classes]) for name in ("k_bits", "v_bits")]
        for h, cls in enumerate(c for c in self.classes for _ in range(c.count)):
            kind = KINDS.get(cls.policy, OTHER)
            places = [number for side in sides for number in side[h]]
            scores = score if kind == SCORED else -1
            rows.append(HeadRow(cls.capacity, cls.sink, cls.recent, kind, scores, slot, *places))
            slot += cls.capacity
            score += cls.capacity if kind == SCORED else 0
        return tuple(rows)

    def __deepcopy__(self, memo: object) -> LayerLayout:
        return self  # constant, with all that is derived from it


def side_places(layout: LayerLayout, bits: Sequence[int]) -> list[Place]:
    """Where the heads of a layer lie, by storage position, if class i is stored at `bits[i]`."""
    places: list[Place] = []
    rows: dict[int, int] = {}
    anchors = 0
    for cls, stored in zip(layout.classes, bits, strict=True):
        codec = stored if is_quantised(stored) else EXACT
        anchored = codec != EXACT and codec_of(codec).needs_anchor and cls.sink > 0
        for _ in range(cls.count):
            row = rows.get(codec, 0)
            places.append(Place(codec, row, anchors if anchored else -1))
            rows[codec] = row + cls.capacity
            anchors += anchored
    return places
