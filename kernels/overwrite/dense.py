"""`overwrite` in torch."""

from __future__ import annotations

import torch


def overwrite(store: torch.Tensor, new: torch.Tensor, slot: torch.Tensor) -> None:
    """See `api.overwrite`."""
    new = new.to(store.dtype)
    if slot.shape[2] == 1:  # a decode step, without a look at the slots' values: no host synchronisation
        index = slot.clamp(min=0).unsqueeze(3).expand_as(new)
        store.scatter_(2, index, torch.where(slot.unsqueeze(3) < 0, store.gather(2, index), new))
        return
    sequence, head, token = (slot >= 0).nonzero(as_tuple=True)
    store[sequence, head, slot[sequence, head, token]] = new[sequence, head, token]
