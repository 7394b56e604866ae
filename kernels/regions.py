"""Where the codes and the scales of every codec lie in the two flat buffers that a side (keys or values) has of them.

A codec's rows lie end to end, a region. Nothing is padded; instead, regions are in the order of the largest power of
two that divides the size of a row, highest first, so that each begins at a multiple of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvcompile.kernels.codecs import CODECS, codec_of, is_quantised
from kvcompile.kernels.layout import EXACT, LayerLayout, side_places

WIDEST = 16
"""Bytes of the widest load of a thread on a GPU: more alignment than this is of no use."""


class Region(NamedTuple):
    """The `rows` of one codec: `code_bytes` each from byte `codes` of a sequence on, and `groups` scales each from
    number `scales` on."""

    rows: int
    code_bytes: int
    groups: int
    codes: int
    scales: int


class Start(NamedTuple):
    """The first byte of a head's codes, and the first number of its scales."""

    codes: int
    scales: int


class Units(NamedTuple):
    """Of how many bytes all places of codes are multiples, and of how many numbers those of scales, in any sequence."""

    codes: int
    scales: int


def regions(layout: LayerLayout, bits: Sequence[int], head_dim: int) -> dict[int, Region]:
    """The codecs that heads of a layer are stored with, if class i is stored at `bits[i]`, in the order of `CODECS`."""
    key = ("regions", tuple(bits), head_dim)
    if key not in layout.memo:
        layout.memo[key] = _regions(layout, bits, head_dim)
    found: dict[int, Region] = layout.memo[key]
    return found


def _regions(layout: LayerLayout, bits: Sequence[int], head_dim: int) -> dict[int, Region]:
    rows = {codec: 0 for codec in CODECS if codec in bits}
    for cls, stored in zip(layout.classes, bits, strict=True):
        if is_quantised(stored):
            rows[stored] += cls.slots
    code_bytes = {codec: codec_of(codec).code_bytes(head_dim) for codec in rows}
    groups = {codec: codec_of(codec).groups(head_dim) for codec in rows}
    codes, scales = _firsts(rows, code_bytes), _firsts(rows, groups)
    return {c: Region(rows[c], code_bytes[c], groups[c], codes[c], scales[c]) for c in rows}


def _firsts(rows: dict[int, int], sizes: dict[int, int]) -> dict[int, int]:
    """Where the region of every codec begins if its rows have this size."""
    firsts, end = {}, 0
    for codec in sorted(rows, key=lambda codec: -_power(sizes[codec])):
        firsts[codec] = end
        end += rows[codec] * sizes[codec]
    return firsts


def _power(size: int) -> int:
    """The largest power of two that divides it."""
    return size & -size


def starts(layout: LayerLayout, bits: Sequence[int], head_dim: int) -> list[Start]:
    """Where the heads of a layer begin, by storage position; those in the cache dtype at 0."""
    found, own = [], regions(layout, bits, head_dim)
    for place in side_places(layout, bits):
        if place.codec == EXACT:
            found.append(Start(0, 0))
        else:
            region = own[place.codec]
            found.append(Start(region.codes + place.row * region.code_bytes, region.scales + place.row * region.groups))
    return found


def units(codecs: Iterable[int], head_dim: int) -> Units:
    """What a side with these codecs may rely on. The next sequence's codes follow at once, so that it is the least of
    what the codecs have, whichever begins where."""
    known = [codec_of(id) for id in codecs]
    return Units(
        min([WIDEST, *(_power(codec.code_bytes(head_dim)) for codec in known)]),
        min([WIDEST // 2, *(_power(codec.groups(head_dim)) for codec in known)]),
    )
