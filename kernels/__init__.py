"""Attention and cache operations over a ragged store: one folder an operation.

In each, `reference.py` defines what the operation computes, one head at a time; `dense.py` does it in torch with heads
of equal shape as one batch; `api.py` validates and dispatches. The implementations never import each other.
"""

from __future__ import annotations

from kvcompile.kernels.append.api import append
from kvcompile.kernels.compact.api import compact
from kvcompile.kernels.layout import HeadClass, LayerLayout
from kvcompile.kernels.ragged_attention.api import ragged_attention

__all__ = ["HeadClass", "LayerLayout", "append", "compact", "ragged_attention"]
