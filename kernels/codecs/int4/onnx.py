"""int4 with standard ONNX operators.

Of the two codes in a byte the first is that of an element in the first half of its group, the second that of the one
half a group further on, so that neither packing nor unpacking interleaves anything: transforms of such heads come with
their rows in that order (`order`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvcompile.kernels.codecs.int4 import CODEC
from kvcompile.kernels.codecs.integers import onnx as integers
from kvcompile.kernels.codecs.integers.onnx import encode

if TYPE_CHECKING:
    from kvcompile.export.onnx.builder import Builder

__all__ = ["decode", "encode", "order", "pack", "plain", "restoring"]


def order(head_dim: int) -> NDArray[np.int64]:
    """The order of a vector's elements in which the graph has them: of each group the even ones before the odd ones."""
    parts = np.arange(head_dim).reshape(CODEC.groups(head_dim), -1)
    return np.concatenate([parts[:, 0::2], parts[:, 1::2]], axis=1).ravel()


def pack(b: Builder, codes: str, head_dim: int) -> str:
    """Bytes from codes as `integers.encode` has them."""
    size = head_dim // CODEC.groups(head_dim)
    low, high = b.split(codes, [size // 2] * 2, -1)
    packed = b.op("BitwiseOr", low, b.op("BitShift", high, b.scalar(4, "uint8"), direction="LEFT"))
    return integers.joined(b, packed, CODEC, head_dim)


def plain(b: Builder, codes: str) -> str:
    """Bytes of a group as float32 with little work: first the whole bytes, 16 high + low, and then their high halves;
    `restoring` sets that right on the other side of a product."""
    high = b.op("BitShift", codes, b.scalar(4, "uint8"), direction="RIGHT")
    return b.cast(b.concat([codes, high], -1), "float32")


def restoring(size: int) -> NDArray[np.float32]:
    """The matrix M [size + 1, size] with y = [p, 1] M for a group's vector y, scale aside, and its `plain` codes p. So
    a query q meets them as M q, what it is multiplied with and what is added, and a weighted sum of them is
    [sum of p, sum of weights] M."""
    right = np.eye(size, dtype=np.float32)
    right[size // 2 :, : size // 2] = -16 * np.eye(size // 2)  # low = byte - 16 high
    return integers.restoring(CODEC, right)


def decode(b: Builder, codes: str, scales: str, head_dim: int) -> str:
    """Vectors float32 [B, n, X, D] from bytes [B, n, X, D / 2] and scales [B, n, X, groups]."""
    codes = integers.by_group(b, codes, CODEC, head_dim)
    low = b.op("BitwiseAnd", codes, b.scalar(15, "uint8"))
    high = b.op("BitShift", codes, b.scalar(4, "uint8"), direction="RIGHT")
    return integers.decode(b, b.concat([low, high], -1), scales, CODEC, head_dim)
