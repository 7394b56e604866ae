"""The work list of a layer: items of about equal bytes, as many as programs run at a time or a few more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import HeadRow, LayerLayout

FAN = 8
"""Items of a head with many that are joined at a time. To join what groups of items have found takes another store,
atomic and load, which is about as long as it takes to load another 8."""
BEGIN = 1
"""To begin an item takes a program about as long as a block of slots."""
WORTH = 0.95
"""Of the longest item's length the longest program must have at most, if more items than programs are to be worth it:
as long as some are not begun, the next launch cannot begin either."""
TRIES = 20
"""Steps of a bisection."""
MOST_BLOCKS = 1 << 13
"""Of a head, beyond which they are taken together: the kernel multiplies with their number, in 32 bits."""


@dataclass(frozen=True)
class Item:
    """The `part`-th of a head's items: the blocks of slots [first, last) of those that a full head has, or as large a
    share of its slots."""

    head: int
    part: int
    first: int
    last: int


Programs = Sequence[Sequence[Item]]


@dataclass(frozen=True)
class WorkList:
    """`items` in the order of heads and their slots, and of every head how many `counts` of items and `blocks` of slots
    it has, and how many bytes a block has (`weights`). Which slots an item has depends on how many are filled, see
    `span`."""

    items: tuple[Item, ...]
    counts: tuple[int, ...]
    blocks: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def fan(self) -> int:
        """Items of a head that are joined at a time: all of them, where that takes no longer than joining twice."""
        return 2 * FAN if max(self.counts) <= 2 * FAN else FAN

    def length(self, at: int) -> float:
        """Bytes of an item of a full head, and those that a program could read while it begins with it."""
        return _length([self.items[at]], self.weights)


def slot_weight(row: HeadRow, head_dim: int, exact_bits: int) -> float:
    """Bytes of a slot's key and value, scales aside."""
    codecs = (row.k_codec, row.v_codec)
    return sum(codec_of(id).code_bytes(head_dim) if id else exact_bits * head_dim / 8 for id in codecs)


def work_list(layout: LayerLayout, head_dim: int, exact_bits: int, programs: int, block: int, most: int) -> WorkList:
    """Divide a layer's slots among about `programs` programs (at least one a head) that run at a time, with at most
    `most` items a head, so that the last one is done early.

    Either every program has an item, or some have two: the end of one head, and the beginning of the next (as with
    Stream-K's tiles, Osama et al., arXiv 2301.03598). Budgets that differ between heads are then as good as equal ones.
    A program is in truth launched for either of the two, the second when another is done.
    """
    while max(row.capacity for row in layout.rows) > MOST_BLOCKS * block:
        block *= 2
    weights = [block * slot_weight(row, head_dim, exact_bits) for row in layout.rows]
    blocks = [-(-row.capacity // block) for row in layout.rows]
    best = _shared_out(blocks, weights, programs, most)
    lengths = [_length(program, weights) for program in best]
    low, high = min(sum(lengths) / programs, WORTH * max(lengths)), WORTH * max(lengths)
    for _ in range(TRIES):
        middle = (low + high) / 2
        found = _cut(blocks, weights, middle)
        if len(found) <= programs and max(item.part for program in found for item in program) < most:
            best, high = found, middle
        else:
            low = middle
    items = [item for program in best for item in program]
    counts = [sum(item.head == h for item in items) for h in range(len(blocks))]
    return WorkList(tuple(items), tuple(counts), tuple(blocks), tuple(weights))


def _length(program: Sequence[Item], weights: Sequence[float]) -> float:
    return sum((item.last - item.first + BEGIN) * weights[item.head] for item in program)


def _shared_out(blocks: Sequence[int], weights: Sequence[float], programs: int, most: int) -> Programs:
    """An item a program. Of all numbers of items up to `programs`, that whose largest item is smallest: heads get items
    one by one, always the head whose items are largest (the same greedy rule as for seats in a parliament)."""
    counts = [1] * len(blocks)

    def largest(h: int) -> float:
        return -(-blocks[h] // counts[h]) * weights[h]

    for _ in range(max(programs - len(counts), 0)):
        h = max(range(len(counts)), key=largest)
        if counts[h] >= min(blocks[h], most):
            break
        counts[h] += 1
    return [
        [Item(h, part, blocks[h] * part // count, blocks[h] * (part + 1) // count)]
        for h, count in enumerate(counts)
        for part in range(count)
    ]


def _cut(blocks: Sequence[int], weights: Sequence[float], length: float) -> Programs:
    """Programs of at most `length` (and at least a block): each goes on where the one before stopped."""
    found: list[list[Item]] = [[]]
    left = length
    for h, (count, weight) in enumerate(zip(blocks, weights, strict=True)):
        at, part = 0, 0
        while at < count:
            fit = int(left / weight + 1e-9) - BEGIN
            if fit < 1 and found[-1]:
                found.append([])
                left = length
                continue
            last = min(count, at + max(fit, 1))
            found[-1].append(Item(h, part, at, last))
            left -= (last - at + BEGIN) * weight
            at, part = last, part + 1
    return found


def span(item: Item, count: int, blocks: int, filled: int, block: int) -> tuple[int, int]:
    """The slots [start, stop) of an item if `filled` of its head's slots are, of whose items there are `count` and of
    whose blocks `blocks`. Of fewer blocks than items the first items have one each, so that short texts are spread
    as long ones are. The kernel computes the same from `seen`."""
    now = -(-filled // block)
    if now < count:
        first, last = (item.part, item.part + 1) if item.part < now else (0, 0)
    else:
        first, last = now * item.first // blocks, now * item.last // blocks
    return first * block, min(last * block, filled)
