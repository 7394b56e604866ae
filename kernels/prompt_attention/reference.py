"""What attention of prompts computes: float64, one sequence, head and query at a time."""

from __future__ import annotations

import torch


def prompt_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pad: torch.Tensor | None,
    window: int,
    scaling: float,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `api.prompt_attention`; float64 [B, num_heads, T, D]. Padding sees itself alone."""
    batch, num_heads, length, _ = query.shape
    heads, before = keys.shape[1], keys.shape[2] - length
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        first = 0 if pad is None else int(pad[b])
        for q in range(num_heads):
            h = q // (num_heads // heads)
            for t in range(length):
                own = before + t
                oldest = max(first, own - window + 1 if window else 0)
                there = [j for j in range(oldest, own) if kept is None or j >= before or bool(kept[h, j])]
                see = [*there, own]
                weights = (keys[b, h, see].double() @ query[b, q, t].double() * scaling).softmax(0)
                out[b, q, t] = weights @ values[b, h, see].double()
    return out
