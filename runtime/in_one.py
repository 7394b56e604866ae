"""A layer's whole decode step in one call of C, where that can be: transforms, the write and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvcompile.kernels import native

if TYPE_CHECKING:
    from kvcompile.runtime.store import LayerStore


def usable(store: LayerStore, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `step` can be taken: on a CPU, of one dtype (under autocast values have another than what is rotated),
    with a plain softmax and no policy that places tokens itself."""
    same = query.dtype == keys.dtype == values.dtype and query.device == store.keys.exact.device
    return same and store.softmax.plain and native.takes_steps(query, store.layout)


def step(
    store: LayerStore,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    score: torch.Tensor | None,
    seen: Sequence[int] | torch.Tensor,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `LayerStore.steps` does: `query` [B, num_heads, D], `keys` and `values` [B, num_kv_heads, D], as the model
    has them, `score` f32 [B, num_kv_heads]; as `query`."""
    stored = store.keys, store.values, store.scores, store.layout
    return native.step(query, keys, values, *stored, store.transform, score, seen, scaling, places)
