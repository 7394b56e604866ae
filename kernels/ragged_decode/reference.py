"""What ragged attention computes: float64, one sequence, head and query at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.ragged_decode.totals import Totals


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
    new_pad: torch.Tensor | None = None,
    totals: Totals | None = None,
) -> torch.Tensor:
    """See `api.ragged_decode`; float64 [B, num_heads, T, D]."""
    batch, num_heads, length, _ = query.shape
    group = num_heads // layout.num_kv_heads
    out = torch.zeros(query.shape, dtype=torch.float64)
    logarithm = torch.zeros(query.shape[:3], dtype=torch.float64)
    heads = [(cls, i) for cls in layout.classes for i in range(cls.count)]
    for b in range(batch):
        total = length if new_keys is None else new_keys.shape[2]
        own, number = _new(total, b, layout.window, new_mask, new_pad)
        first = seen[b] - (new_keys is None)  # number of the first new token
        for h, (cls, i) in enumerate(heads):
            filled = min(seen[b], cls.capacity)
            stored_k, stored_v = (stored.read(cls, filled, torch.float64)[b, i] for stored in (keys, values))
            holds = {}
            for token in range(seen[b]):
                holds[cls.ring_slot(token)] = token
            for t in range(length):
                asks = total - length + t
                oldest = first + number[asks] - layout.window if layout.window else -1
                see = [s for s in range(filled) if holds[s] > oldest]
                k, v = stored_k[see], stored_v[see]
                if new_keys is not None and new_values is not None:
                    k = torch.cat([k, new_keys[b, h, own[asks]].double()])
                    v = torch.cat([v, new_values[b, h, own[asks]].double()])
                for q in range(h * group, (h + 1) * group):
                    logits = k @ query[b, q, t].double() * scaling
                    if totals is not None:
                        at = (
                            slice(b, b + 1),
                            slice(h, h + 1),
                            slice(q - h * group, q - h * group + 1),
                            slice(t, t + 1),
                        )
                        logits = totals.bent(logits.view(1, 1, 1, 1, -1), at).flatten()
                    logarithm[b, q, t] = logits.logsumexp(0)
                    out[b, q, t] = logits.softmax(0) @ v
    if totals is not None:
        totals.logarithm = logarithm
    return out


def _new(
    total: int, b: int, window: int, new_mask: torch.Tensor | None, new_pad: torch.Tensor | None
) -> tuple[list[list[int]], list[int]]:
    """Which new tokens each of them sees, and their numbers, padding not counted."""
    if new_mask is not None:
        seen = [[j for j in range(total) if bool(new_mask[b, 0, t, j])] for t in range(total)]
    else:
        pad = 0 if new_pad is None else int(new_pad[b])
        seen = [[j for j in range(pad, t + 1) if not window or j > t - window] or [t] for t in range(total)]
    real = [t in own and (new_pad is None or t >= int(new_pad[b])) for t, own in enumerate(seen)]
    return seen, [sum(real[: t + 1]) - 1 for t in range(total)]
