"""Attention and cache operations over a ragged store: one folder an operation.

In each, `reference.py` defines what the operation computes, one head at a time; `dense.py` does it in torch with heads
of equal shape as one batch; `api.py` validates and dispatches. The implementations never import each other.
"""

from __future__ import annotations

from kvcompile.kernels.append.api import append
from kvcompile.kernels.compact.api import compact
from kvcompile.kernels.layout import HeadClass, HeadSpec, LayerLayout
from kvcompile.kernels.quantise.api import decode, encode
from kvcompile.kernels.ragged_attention.api import ragged_attention
from kvcompile.kernels.stored import Stored

__all__ = [
    "HeadClass", "HeadSpec", "LayerLayout", "Stored", "append", "compact", "decode", "encode", "ragged_attention",
]  # fmt: skip
