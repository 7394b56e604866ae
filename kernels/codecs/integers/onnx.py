"""Codes and scales with standard ONNX operators. `b` writes the nodes and knows values by their names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvcompile.kernels.codecs.base import Codec

if TYPE_CHECKING:
    from kvcompile.export.onnx.builder import Builder

TINY, HUGE = 2.0**-14, 65504.0
"""The least and the largest scale: the smallest normal and the largest number in float16."""


def encode(
    b: Builder, parts: Sequence[str], sizes: Sequence[int], codecs: Sequence[Codec], head_dim: int
) -> list[tuple[str, str]]:
    """Codes and scales of vectors, `parts` [B, `sizes`[i], T, D] in `codecs`[i], all in one go: a node costs more than
    the few numbers of a step that it works on."""
    order = sorted(range(len(parts)), key=lambda i: -codecs[i].bits)  # equal codecs side by side
    counts = [sizes[i] for i in order]
    x = b.concat([parts[i] for i in order], 1)
    split = codecs[0].groups(head_dim)
    half = np.concatenate([np.full(sizes[i], 2.0 ** (codecs[i].bits - 1), np.float32) for i in order])
    half = half.reshape(-1, 1, 1, *([1] if split > 1 else []))
    if split > 1:
        x = b.reshape(x, 0, 0, 0, split, head_dim // split)
    # s = max|x| / half, c = floor(x / s) in -half ... half - 1, stored as c + half.
    largest = b.op("ReduceMax", b.op("Abs", x), b.ints(-1), keepdims=1)
    wide = b.op("Clip", b.op("Mul", largest, b.array(1 / half)), b.scalar(TINY), b.scalar(HUGE))
    scale = b.cast(wide, "float16")
    code = b.op("Floor", b.op("Div", x, b.cast(scale, "float32")))
    code = b.op("Min", b.op("Max", code, b.array(-half)), b.array(half - 1))
    code = b.cast(b.op("Add", code, b.array(half)), "uint8")
    if split > 1:
        scale = b.op("Squeeze", scale, b.ints(-1))
    alike = [list(members) for _, members in groupby(order, lambda i: codecs[i])]
    rows: list[str] = []
    for part, members in zip(b.split(code, [sum(sizes[i] for i in m) for m in alike], 1), alike, strict=True):
        packed = codecs[members[0]].load("onnx").pack(b, part, head_dim)
        rows += b.split(packed, [sizes[i] for i in members], 1)
    made = dict(zip(order, zip(rows, b.split(scale, counts, 1), strict=True), strict=True))
    return [made[i] for i in range(len(parts))]


def decode(b: Builder, codes: str, scales: str, codec: Codec, head_dim: int) -> str:
    """Vectors float32 [B, n, X, D] from codes, one an element and those of a group in a dimension of their own where
    there are several groups, and scales [B, n, X, groups]."""
    split = codec.groups(head_dim)
    if split > 1:
        scales = b.op("Unsqueeze", scales, b.ints(-1))
    centred = b.op("Sub", b.cast(codes, "float32"), b.scalar(2 ** (codec.bits - 1) - 0.5))
    vectors = b.op("Mul", centred, b.cast(scales, "float32"))
    return b.reshape(vectors, 0, 0, 0, head_dim) if split > 1 else vectors


def by_group(b: Builder, codes: str, codec: Codec, head_dim: int) -> str:
    """Packed codes with those of a group in a dimension of their own, where there are several groups."""
    split = codec.groups(head_dim)
    return b.reshape(codes, 0, 0, 0, split, codec.code_bytes(head_dim) // split) if split > 1 else codes


def joined(b: Builder, packed: str, codec: Codec, head_dim: int) -> str:
    """The opposite of `by_group`."""
    return b.reshape(packed, 0, 0, 0, codec.code_bytes(head_dim)) if codec.groups(head_dim) > 1 else packed


def restoring(codec: Codec, right: NDArray[np.float32]) -> NDArray[np.float32]:
    """`right` [size, size], which makes codes of what is multiplied, with the row that puts them about 0 below it."""
    low = np.full((1, right.shape[1]), 0.5 - 2.0 ** (codec.bits - 1), np.float32)
    return np.concatenate([right, low])
