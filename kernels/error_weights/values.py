"""What `error_weights` takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one follow-up to a context, which see all of it and the follow-up's m own tokens causally: `query`
    [num_heads, T, D], `own_keys` [H, m, D], and `places` int64 [T], ascending: which of the own tokens each row is."""

    query: Tensor
    own_keys: Tensor
    places: Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """Float32 sums over a follow-up's rows, or over the context's tokens: `keys` and `values` [H, n], `queries`
    [num_heads, T], and `outputs` [num_heads]."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    outputs: Tensor
