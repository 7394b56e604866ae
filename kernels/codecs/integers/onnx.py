"""Codes and scales with standard ONNX operators. `b` writes the nodes and knows values by their names.

A byte has the codes of elements that lie a half or a quarter of their group apart, so that neither packing nor
unpacking interleaves anything: transforms of such heads come with their rows in that order (`order`), and bytes are the
same as everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcompile.kernels.codecs.base import Codec, Group
from kvcompile.kernels.codecs.integers import LESS, keeps_norm, steps
from kvcompile.kernels.codecs.integers.stretches import Stretch, stretches

if TYPE_CHECKING:
    from kvcompile.export.onnx.builder import Builder

TINY, HUGE = 2.0**-14, 65504.0
"""The least and the largest scale: the smallest normal and the largest number in float16."""


class Piece(NamedTuple):
    """A stretch of the vectors `x` [B, `heads`, T, count size]; `part` says whose, `norm` what `keeps_norm` says."""

    part: int
    stretch: Stretch
    heads: int
    norm: bool
    x: str


def order(codec: Codec, head_dim: int) -> NDArray[np.int64]:
    """The order of a vector's elements in which the graph has them: of each group first those whose codes come first in
    a byte. What is not stored stays where it is."""
    found = np.arange(head_dim)
    for bits, start, size, _ in codec.split(head_dim):
        found[start : start + size] = found[start : start + size].reshape(-1, _in_a_byte(bits)).T.ravel()
    return found


def encode(
    b: Builder, parts: Sequence[str], sizes: Sequence[int], codecs: Sequence[Codec], head_dim: int
) -> list[tuple[str, str]]:
    """Codes and scales of vectors, `parts` [B, `sizes`[i], T, D] in `codecs`[i]. Stretches of equal shape are worked on
    in one go: a node costs more than the few numbers of a step that it works on."""
    pieces: list[Piece] = []
    for i, (x, heads, codec) in enumerate(zip(parts, sizes, codecs, strict=True)):
        cut = stretches(codec, head_dim)
        stored = [stretch.count * stretch.size for stretch in cut]
        rest = head_dim - sum(stored)  # what is not stored
        found = b.split(x, [*stored, rest] if rest else stored, 3)[: len(cut)]
        norm = keeps_norm(codec.sections)
        pieces += [Piece(i, stretch, heads, norm, piece) for stretch, piece in zip(cut, found, strict=True)]
    made: list[list[tuple[int, str, str]]] = [[] for _ in parts]
    for shape in dict.fromkeys((piece.stretch.count, piece.stretch.size) for piece in pieces):
        # Equal bits side by side, to be packed together.
        alike = [piece for piece in pieces if (piece.stretch.count, piece.stretch.size) == shape]
        alike.sort(key=lambda piece: -piece.stretch.bits)
        for piece, (codes, scales) in zip(alike, _encode_alike(b, alike), strict=True):
            made[piece.part].append((piece.stretch.start, codes, scales))
    ordered = [sorted(found) for found in made]  # by their first elements
    return [(b.concat([f[1] for f in found], 3), b.concat([f[2] for f in found], 3)) for found in ordered]


def _encode_alike(b: Builder, pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Codes [B, heads, T, X] and scales [B, heads, T, count] of pieces of one shape, ordered by their bits."""
    count, size, heads = pieces[0].stretch.count, pieces[0].stretch.size, [piece.heads for piece in pieces]
    x = b.concat([piece.x for piece in pieces], 1)
    half = np.concatenate([np.full(piece.heads, 2.0 ** (piece.stretch.bits - 1), np.float32) for piece in pieces])
    half = half.reshape(-1, 1, 1, *([1] if count > 1 else []))
    most_steps = max(len(steps(piece.stretch.bits)) for piece in pieces)
    tried = np.concatenate([np.tile(_steps(piece.stretch.bits, most_steps), (piece.heads, 1)) for piece in pieces])
    if count > 1:
        x = b.reshape(x, 0, 0, 0, count, size)
    largest = b.op("ReduceMax", b.op("Abs", x), b.ints(-1), keepdims=1)
    largest = b.op("Min", b.op("Max", largest, b.array(TINY * half)), b.array(HUGE * half))
    unit = b.op("Clip", b.op("Div", x, largest), b.scalar(-1), b.scalar(1))
    # All steps side by side in a dimension before the others.
    rates = (half[None] / tried.T.reshape(most_steps, *half.shape))[:, None].astype(np.float32)
    level = b.op("Floor", b.op("Mul", b.op("Unsqueeze", unit, b.ints(0)), b.array(rates)))
    level = b.op("Add", b.op("Min", b.op("Max", level, b.array(-half)), b.array(half - 1)), b.scalar(0.5))
    along = b.op("ReduceSum", b.op("Mul", level, unit), b.ints(-1), keepdims=1)
    square = b.op("ReduceSumSquare", level, b.ints(-1), keepdims=1)
    if most_steps > 1:
        less = (1 - LESS * np.arange(most_steps, dtype=np.float32)).reshape(-1, 1, *[1] * half.ndim)
        worth = b.op("Mul", b.op("Div", b.op("Mul", along, along), square), b.array(less))
        best = b.op("ArgMax", worth, axis=0, keepdims=1)
        along, square = (b.op("GatherElements", one, best, axis=0) for one in (along, square))
        best = b.op("Expand", best, b.op("Shape", b.op("Unsqueeze", unit, b.ints(0))))
        level = b.op("GatherElements", level, best, axis=0)
    level, along, square = (b.op("Squeeze", one, b.ints(0)) for one in (level, along, square))
    own = b.op("ReduceSumSquare", unit, b.ints(-1), keepdims=1)
    norm = np.concatenate([np.full(piece.heads, piece.norm) for piece in pieces]).reshape(half.shape)
    by_norm, by_product = b.op("Sqrt", b.op("Div", own, square)), b.op("Div", own, b.op("Max", along, b.scalar(TINY)))
    wide = b.op("Mul", largest, b.op("Where", b.array(norm), by_norm, by_product))
    scale = b.cast(b.op("Clip", wide, b.scalar(TINY), b.scalar(HUGE)), "float16")
    code = b.cast(b.op("Add", level, b.array(half - 0.5)), "uint8")
    if count > 1:
        scale = b.op("Squeeze", scale, b.ints(-1))
    alike = [(bits, list(same)) for bits, same in groupby(pieces, lambda piece: piece.stretch.bits)]
    totals = [sum(piece.heads for piece in same) for _, same in alike]
    rows: list[str] = []
    for part, (bits, same) in zip(b.split(code, totals, 1), alike, strict=True):
        packed = pack(b, part, bits)
        if count > 1:
            packed = b.reshape(packed, 0, 0, 0, count * size * bits // 8)
        rows += b.split(packed, [piece.heads for piece in same], 1)
    return list(zip(rows, b.split(scale, heads, 1), strict=True))


def _steps(bits: int, count: int) -> NDArray[np.float64]:
    """`steps` of as many as `count`, the last one repeated."""
    tried = steps(bits)
    return np.array([*tried, *tried[-1:] * (count - len(tried))])


def decode(b: Builder, codes: str, scales: str, codec: Codec, head_dim: int) -> str:
    """Vectors float32 [B, n, X, D] from codes [B, n, X, code bytes] and scales [B, n, X, groups]."""
    cut = stretches(codec, head_dim)
    parts = b.split(codes, [stretch.count * stretch.size * stretch.bits // 8 for stretch in cut], 3)
    found = []
    for (bits, _, size, _, count), part, scale in zip(
        cut, parts, b.split(scales, [stretch.count for stretch in cut], 3), strict=True
    ):
        if count > 1:
            part = b.reshape(part, 0, 0, 0, count, size * bits // 8)
            scale = b.op("Unsqueeze", scale, b.ints(-1))
        centred = b.op("Sub", b.cast(unpack(b, part, bits, size), "float32"), b.scalar(2 ** (bits - 1) - 0.5))
        vectors = b.op("Mul", centred, b.cast(scale, "float32"))
        found.append(b.reshape(vectors, 0, 0, 0, count * size) if count > 1 else vectors)
    return b.padded(b.concat(found, 3), head_dim - cut[-1].start - cut[-1].count * cut[-1].size)


def plain(b: Builder, codes: str, group: Group) -> str:
    """Bytes of a group as float32 with little work; `restoring` sets right on the other side of a product what is
    missing. At 4 and 2 bits a byte comes whole and without its lower codes, which is one pass over the bytes less than
    masking the others out."""
    codes = unpack(b, codes, 3, group.size) if group.bits == 3 else _shifted(b, codes, group.bits)
    return b.cast(codes, "float32")


def restoring(group: Group) -> NDArray[np.float32]:
    """The matrix M [size + 1, size] with y = [p, 1] M for a group's vector y, scale aside, and its `plain` codes p. So
    a query q meets them as M q, what it is multiplied with and what is added, and a weighted sum of them is
    [sum of p, sum of weights] M."""
    bits, size = group.bits, group.size
    right = np.eye(size, dtype=np.float32)
    if bits in (2, 4):  # code = what begins with it - 2^bits times what begins with the next
        right -= 2**bits * np.eye(size, k=-(size * bits // 8), dtype=np.float32)
    return np.concatenate([right, np.full((1, size), 0.5 - 2.0 ** (bits - 1), np.float32)])


def pack(b: Builder, codes: str, bits: int) -> str:
    """Bytes [..., size bits / 8] of codes [..., size] in the graph's order."""
    if bits == 8:
        return codes
    if bits == 3:  # the low two bits of all, then the high ones
        high = b.op("BitShift", codes, b.scalar(2, "uint8"), direction="RIGHT")
        low = b.op("BitwiseAnd", codes, b.scalar(3, "uint8"))
        return b.concat([pack(b, low, 2), _laid_over(b, _laid_over(b, high, 4, 1), 2, 4)], -1)
    return _laid_over(b, codes, 8 // bits, bits)


def unpack(b: Builder, packed: str, bits: int, size: int) -> str:
    """Codes [..., size] in the graph's order of bytes [..., size bits / 8]."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = b.split(packed, [size // 4, size // 8], -1)
        nibbles = unpack(b, high, 4, size // 4)
        high = b.op("BitwiseAnd", _shifted(b, nibbles, 1, 4), b.scalar(1, "uint8"))
        return b.op(
            "BitwiseOr", unpack(b, low, 2, size), b.op("BitShift", high, b.scalar(2, "uint8"), direction="LEFT")
        )
    return b.op("BitwiseAnd", _shifted(b, packed, bits), b.scalar(2**bits - 1, "uint8"))


def _in_a_byte(bits: int) -> int:
    """Elements whose codes begin in one byte."""
    return 4 if bits == 3 else 8 // bits


def _laid_over(b: Builder, codes: str, count: int, bits: int) -> str:
    """The `count` parts of the last dimension in one, each `bits` higher than the one before."""
    together, *parts = b.several("Split", count, codes, axis=-1, num_outputs=count)
    for i, part in enumerate(parts, 1):
        shifted = b.op("BitShift", part, b.scalar(bits * i, "uint8"), direction="LEFT")
        together = b.op("BitwiseOr", together, shifted)
    return together


def _shifted(b: Builder, packed: str, bits: int, count: int | None = None) -> str:
    """Bytes [..., n] as they are and without what lies below each further code, [..., count n]; by default as often as
    a byte has codes."""
    steps = [b.scalar(bits * i, "uint8") for i in range(1, count or 8 // bits)]
    return b.concat([packed, *(b.op("BitShift", packed, step, direction="RIGHT") for step in steps)], -1)
