"""What `compact` does, one slot at a time."""

from __future__ import annotations

import torch


def compact(store: torch.Tensor, prompt: torch.Tensor, token: torch.Tensor) -> None:
    """See `api.compact`."""
    for h in range(token.shape[0]):
        for s in range(token.shape[1]):
            store[h, s] = prompt[h, int(token[h, s])].to(store.dtype)
