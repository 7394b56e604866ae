"""What ragged attention computes: float64, one sequence, head and query at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.layout import LayerLayout


def ragged_decode(
    query: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    seen: Sequence[int],
    *,
    scaling: float,
    new_keys: torch.Tensor | None = None,
    new_values: torch.Tensor | None = None,
    new_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `api.ragged_decode`; float64 [B, num_heads, T, D]."""
    batch, num_heads, length, _ = query.shape
    group = num_heads // layout.num_kv_heads
    out = torch.zeros(query.shape, dtype=torch.float64)
    heads = [(cls, i) for cls in layout.classes for i in range(cls.count)]
    for b in range(batch):
        first = seen[b] - (new_keys is None)  # number of the first query's token
        for h, (cls, i) in enumerate(heads):
            filled = min(seen[b], cls.capacity)
            stored_k, stored_v = (stored.read(cls, filled, torch.float64)[b, i] for stored in (keys, values))
            holds = {}
            for token in range(seen[b]):
                holds[cls.ring_slot(token)] = token
            for t in range(length):
                see = [s for s in range(filled) if not layout.window or holds[s] > first + t - layout.window]
                k, v = stored_k[see], stored_v[see]
                if new_keys is not None and new_values is not None:
                    new = [j for j in range(length) if (j <= t if new_mask is None else bool(new_mask[b, 0, t, j]))]
                    k = torch.cat([k, new_keys[b, h, new].double()])
                    v = torch.cat([v, new_values[b, h, new].double()])
                for q in range(h * group, (h + 1) * group):
                    weights = (k @ query[b, q, t].double() * scaling).softmax(0)
                    out[b, q, t] = weights @ v
    return out
