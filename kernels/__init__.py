"""Attention and cache operations over a ragged store: one folder an operation.

In each, `reference.py` defines what the operation computes, one head at a time; `dense.py` does it in torch;
`triton.py` does it on a GPU; `api.py` validates and dispatches. The implementations never import each other.
"""

from __future__ import annotations

from kvcompile.kernels.append.api import append
from kvcompile.kernels.buffers import Stored
from kvcompile.kernels.compact.api import compact
from kvcompile.kernels.layout import HeadClass, HeadSpec, LayerLayout
from kvcompile.kernels.overwrite.api import overwrite
from kvcompile.kernels.quantise.api import decode, encode
from kvcompile.kernels.ragged_decode.api import ragged_decode
from kvcompile.kernels.transform import Turn

__all__ = [
    "HeadClass", "HeadSpec", "LayerLayout", "Stored", "Turn", "append", "compact", "decode", "encode", "overwrite",
    "ragged_decode",
]  # fmt: skip
