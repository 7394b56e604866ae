"""int3 with standard ONNX operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvcompile.kernels.codecs.int3 import CODEC
from kvcompile.kernels.codecs.integers import onnx as integers
from kvcompile.kernels.codecs.integers.onnx import encode, plain, restoring

if TYPE_CHECKING:
    from kvcompile.export.onnx.builder import Builder

__all__ = ["decode", "encode", "order", "plain", "restoring"]


def order(head_dim: int) -> NDArray[np.int64]:
    """See `integers.order`."""
    return integers.order(CODEC, head_dim)


def decode(b: Builder, codes: str, scales: str, head_dim: int) -> str:
    """See `integers.decode`."""
    return integers.decode(b, codes, scales, CODEC, head_dim)
