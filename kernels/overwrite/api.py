"""Write new tokens in place: the checked entry point."""

from __future__ import annotations

import torch

from kvcompile.kernels.overwrite import dense


def overwrite(store: torch.Tensor, new: torch.Tensor, slot: torch.Tensor) -> None:
    """Write `new` [B, H, T, D] into `store` [B, H, capacity, D] (a class's view) at `slot` int64 [B, H, T], in place.

    A slot of -1 drops its token. Slots that are written must be distinct within a head.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if store.shape[:2] != new.shape[:2] or store.shape[3] != new.shape[3] or slot.shape != new.shape[:3]:
        raise ValueError(f"store {tuple(store.shape)}, new {tuple(new.shape)} and slot {tuple(slot.shape)} do not fit")
    dense.overwrite(store, new, slot)
