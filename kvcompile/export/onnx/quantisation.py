"""Rounding to 4 and 8 bits with standard operators, as `artifacts/FORMAT.md` has it.

Of two 4-bit codes in a byte the first is that of an element in the first half of its group, the second that of the one
half a group further on: transforms of such heads come with their rows in that order (`halves_first`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import groups
from kvcompile.export.onnx.builder import Builder

TINY, HUGE = 2.0**-14, 65504.0
"""The least and the largest scale: the smallest normal and the largest number in float16."""


def halves_first(head_dim: int) -> NDArray[np.int64]:
    """The order of a vector's elements in which each group has its even ones before its odd ones."""
    parts = np.arange(head_dim).reshape(groups(head_dim), -1)
    return np.concatenate([parts[:, 0::2], parts[:, 1::2]], axis=1).ravel()


def encode(
    b: Builder, parts: Sequence[str], sizes: Sequence[int], bits: Sequence[int], head_dim: int
) -> list[tuple[str, str]]:
    """Codes and scales of turned vectors, `parts` [B, `sizes`[i], T, D] with `bits`[i], all in one go."""
    order = sorted(range(len(parts)), key=lambda i: -bits[i])  # those of 8 bits first
    counts = [sizes[i] for i in order]
    x = b.concat([parts[i] for i in order], 1)
    split = groups(head_dim)
    half = np.concatenate([np.full(sizes[i], 2.0 ** (bits[i] - 1), np.float32) for i in order])
    half = half.reshape(-1, 1, 1, *([1] if split > 1 else []))
    if split > 1:
        x = b.reshape(x, 0, 0, 0, split, head_dim // split)
    largest = b.op("ReduceMax", b.op("Abs", x), b.ints(-1), keepdims=1)
    wide = b.op("Clip", b.op("Mul", largest, b.array(1 / half)), b.scalar(TINY), b.scalar(HUGE))
    scale = b.cast(wide, "float16")
    code = b.op("Floor", b.op("Div", x, b.cast(scale, "float32")))
    code = b.op("Min", b.op("Max", code, b.array(-half)), b.array(half - 1))
    code = b.cast(b.op("Add", code, b.array(half)), "uint8")
    if split > 1:
        scale = b.op("Squeeze", scale, b.ints(-1))
    eights = sum(sizes[i] for i in order if bits[i] == 8)
    fours = sum(counts) - eights
    whole, packed = (code, code) if not eights or not fours else b.split(code, [eights, fours], 1)
    rows: list[str] = []
    if eights:
        whole = b.reshape(whole, 0, 0, 0, head_dim) if split > 1 else whole
        rows += b.split(whole, [sizes[i] for i in order if bits[i] == 8], 1)
    if fours:
        low, high = b.split(packed, [head_dim // split // 2] * 2, -1)
        packed = b.op("BitwiseOr", low, b.op("BitShift", high, b.scalar(4, "uint8"), direction="LEFT"))
        packed = b.reshape(packed, 0, 0, 0, head_dim // 2) if split > 1 else packed
        rows += b.split(packed, [sizes[i] for i in order if bits[i] == 4], 1)
    scales = b.split(scale, counts, 1)
    made = dict(zip(order, zip(rows, scales, strict=True), strict=True))
    return [made[i] for i in range(len(parts))]


def plain(b: Builder, codes: str, bits: int) -> str:
    """Codes as float32 with little work: those of 8 bits as they are; of two 4-bit ones the whole byte, 16 high + low,
    and then the high one. `restoring` sets that right on the other side of the product."""
    if bits == 4:
        high = b.op("BitShift", codes, b.scalar(4, "uint8"), direction="RIGHT")
        codes = b.concat([codes, high], -1)
    return b.cast(codes, "float32")


def restoring(bits: int, size: int) -> NDArray[np.float32]:
    """The matrix M [size + 1, size] with y = [p, 1] M for a group's vector y, scale aside, and its `plain` codes p. So
    a query q meets them as M q, what it is multiplied with and what is added, and a weighted sum of them is
    [sum of p, sum of weights] M."""
    right = np.eye(size, dtype=np.float32)
    if bits == 4:
        right[size // 2 :, : size // 2] = -16 * np.eye(size // 2)
    return np.concatenate([right, np.full((1, size), 0.5 - 2.0 ** (bits - 1), np.float32)])


def decode(b: Builder, codes: str, scales: str, bits: int, head_dim: int) -> str:
    """Turned vectors float32 [B, n, X, D] from codes [B, n, X, D * bits / 8] and scales [B, n, X, groups]."""
    split = groups(head_dim)
    if split > 1:
        codes = b.reshape(codes, 0, 0, 0, split, head_dim * bits // 8 // split)
        scales = b.op("Unsqueeze", scales, b.ints(-1))
    if bits == 4:
        low = b.op("BitwiseAnd", codes, b.scalar(15, "uint8"))
        high = b.op("BitShift", codes, b.scalar(4, "uint8"), direction="RIGHT")
        codes = b.concat([low, high], -1)
    centred = b.op("Sub", b.cast(codes, "float32"), b.scalar(2 ** (bits - 1) - 0.5))
    vectors = b.op("Mul", centred, b.cast(scales, "float32"))
    return b.reshape(vectors, 0, 0, 0, head_dim) if split > 1 else vectors
