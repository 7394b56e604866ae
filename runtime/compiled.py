"""Kernels that a cache will need, compiled before they are launched (`kernels.compiling`)."""

from __future__ import annotations

import torch

from kvcompile.kernels import compact
from kvcompile.kernels.compiling import compiling
from kvcompile.kernels.dispatch import knows, prefers_kernels
from kvcompile.runtime.cache import RaggedCache


@torch.no_grad()
def compile_cuts(cache: RaggedCache, dtype: torch.dtype) -> None:
    """Those that cut prompts of this dtype, once for all caches like it; none changes."""
    first = cache.ragged[0].store
    if not prefers_kernels(first.keys.exact):
        return
    with compiling(first.layout, "cut", dtype) as needed:
        for layer in cache.ragged if needed else ():
            store, layout = layer.store, layer.store.layout
            if not knows("triton", layout):  # torch would write
                continue
            new = store.keys.exact.new_empty(store.batch, layout.num_kv_heads, 1, store.keys.head_dim, dtype=dtype)
            kept = [new.new_zeros(store.batch, cls.count, 1, dtype=torch.int64) for cls in layout.classes]
            compact(store.keys, store.values, layout, new, new, kept, store.seen, store.transform)
