"""The work list of a layer: every head's share of the programs, by the bytes that it stores when it is full."""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import HeadRow, LayerLayout

FAN = 8
"""Items of a head with many that are joined at a time. To join what groups of items have found takes another store,
atomic and load, which is about as long as it takes to load another 8."""


@dataclass(frozen=True)
class WorkList:
    """`items` are (head, number among the head's items), a head's side by side; `heads` has for every head its first
    item and their number. Which slots an item has depends on how many are filled, see `span`."""

    items: tuple[tuple[int, int], ...]
    heads: tuple[tuple[int, int], ...]

    @property
    def most(self) -> int:
        """Items of the head that has most."""
        return max(count for _, count in self.heads)

    @property
    def fan(self) -> int:
        """Items of a head that are joined at a time: all of them, where that takes no longer than joining twice."""
        return 2 * FAN if self.most <= 2 * FAN else FAN


def slot_weight(row: HeadRow, head_dim: int, exact_bits: int) -> float:
    """Bytes of a slot's key and value, scales aside."""
    codecs = (row.k_codec, row.v_codec)
    return sum(codec_of(id).code_bytes(head_dim) if id else exact_bits * head_dim / 8 for id in codecs)


def work_list(layout: LayerLayout, head_dim: int, exact_bits: int, programs: int, block: int, most: int) -> WorkList:
    """Divide about `programs` items (at least one a head, at most `most`) among a layer's heads.

    Of all numbers of items up to `programs`, the one whose largest item is smallest: heads get items one by one, always
    the head whose items are largest (the same greedy rule as for seats in a parliament).
    """
    weights = [slot_weight(row, head_dim, exact_bits) for row in layout.rows]
    blocks = [-(-row.capacity // block) for row in layout.rows]
    counts = [1] * len(blocks)

    def largest(h: int) -> float:
        return -(-blocks[h] // counts[h]) * weights[h]

    for _ in range(max(programs - len(counts), 0)):
        h = max(range(len(counts)), key=largest)
        if counts[h] >= min(blocks[h], most):
            break
        counts[h] += 1
    firsts = [sum(counts[:h]) for h in range(len(counts))]
    items = tuple((h, part) for h, count in enumerate(counts) for part in range(count))
    return WorkList(items, tuple(zip(firsts, counts, strict=True)))


def span(part: int, count: int, filled: int, block: int) -> tuple[int, int]:
    """The slots [start, stop) of item `part` of a head's `count` if `filled` are stored: in multiples of `block`, and
    none for the last items of a head with fewer blocks than items. The kernel computes the same from `seen`."""
    blocks = -(-filled // block)
    count = min(count, blocks)
    if part >= count:
        return 0, 0
    return blocks * part // count * block, min(blocks * (part + 1) // count * block, filled)
