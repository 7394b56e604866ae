"""What `overwrite` does, one token at a time."""

from __future__ import annotations

import torch


def overwrite(store: torch.Tensor, new: torch.Tensor, slot: torch.Tensor) -> None:
    """See `api.overwrite`."""
    for b in range(new.shape[0]):
        for h in range(new.shape[1]):
            for t in range(new.shape[2]):
                if slot[b, h, t] >= 0:
                    store[b, h, int(slot[b, h, t])] = new[b, h, t].to(store.dtype)
