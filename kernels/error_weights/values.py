"""What `error_weights` gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """Float32 sums over rows, or over the context's tokens: `keys` and `values` [H, n], `queries` [num_heads, T], and
    `outputs` [num_heads]."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    outputs: Tensor
