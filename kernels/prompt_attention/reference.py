"""What attention of prompts computes: float64, one sequence, head and query at a time."""

from __future__ import annotations

import torch

from kvcompile.kernels.softmax import PLAIN, Softmax


def prompt_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pad: torch.Tensor | None,
    window: int,
    scaling: float,
    kept: torch.Tensor | None = None,
    softmax: Softmax = PLAIN,
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
                logits = softmax.bent(keys[b, h, see].double() @ query[b, q, t].double() * scaling)
                if softmax.sinks is not None:
                    logits = torch.cat([logits, softmax.sinks[q : q + 1].double()])
                out[b, q, t] = logits.softmax(0)[: len(see)] @ values[b, h, see].double()
    return out
