"""The work list of a layer: ranges of slots of nearly equal bytes, made once, of which a program takes one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import HeadRow, LayerLayout


@dataclass(frozen=True)
class WorkList:
    """`items` are (head, first slot, slot after the last one), a head's side by side; `heads` has for every head its
    first item and their number."""

    items: tuple[tuple[int, int, int], ...]
    heads: tuple[tuple[int, int], ...]


def slot_weight(row: HeadRow, head_dim: int, exact_bits: int) -> float:
    """Bytes of a slot's key and value, scales aside."""
    codecs = (row.k_codec, row.v_codec)
    return sum(codec_of(id).code_bytes(head_dim) if id else exact_bits * head_dim / 8 for id in codecs)


def work_list(layout: LayerLayout, head_dim: int, exact_bits: int, programs: int, block: int) -> WorkList:
    """Cut a layer's heads into about `programs` items (at least one a head), in multiples of `block` slots.

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
        if counts[h] >= blocks[h]:
            break
        counts[h] += 1
    items, heads = [], []
    for h, row in enumerate(layout.rows):
        heads.append((len(items), counts[h]))
        edges = [min(blocks[h] * i // counts[h] * block, row.capacity) for i in range(counts[h] + 1)]
        items += [(h, start, stop) for start, stop in pairwise(edges)]
    return WorkList(tuple(items), tuple(heads))
