"""int8 with standard ONNX operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvcompile.kernels.codecs.int8 import CODEC
from kvcompile.kernels.codecs.integers import onnx as integers
from kvcompile.kernels.codecs.integers.onnx import encode

if TYPE_CHECKING:
    from kvcompile.export.onnx.builder import Builder

__all__ = ["decode", "encode", "order", "pack", "plain", "restoring"]


def order(head_dim: int) -> NDArray[np.int64]:
    """The order of a vector's elements in which the graph has them."""
    return np.arange(head_dim)


def pack(b: Builder, codes: str, head_dim: int) -> str:
    """Bytes from codes as `integers.encode` has them."""
    return integers.joined(b, codes, CODEC, head_dim)


def plain(b: Builder, codes: str) -> str:
    """Bytes of a group as float32 with little work; `restoring` sets right on the other side of a product what is
    missing."""
    return b.cast(codes, "float32")


def restoring(size: int) -> NDArray[np.float32]:
    """The matrix M [size + 1, size] with y = [p, 1] M for a group's vector y, scale aside, and its `plain` codes p. So
    a query q meets them as M q, what it is multiplied with and what is added, and a weighted sum of them is
    [sum of p, sum of weights] M."""
    return integers.restoring(CODEC, np.eye(size, dtype=np.float32))


def decode(b: Builder, codes: str, scales: str, head_dim: int) -> str:
    """Vectors float32 [B, n, X, D] from bytes [B, n, X, D] and scales [B, n, X, groups]."""
    return integers.decode(b, integers.by_group(b, codes, CODEC, head_dim), scales, CODEC, head_dim)
