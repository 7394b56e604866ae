"""How many tokens sequences have, on the host and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvcompile.runtime.store import LayerStore

Lengths = Sequence[int] | torch.Tensor
"""Tokens of every sequence, on the host, or int32 [B] on a GPU."""


def one_more(lengths: Lengths) -> Lengths:
    """What they will be after a step."""
    return lengths + 1 if isinstance(lengths, torch.Tensor) else [n + 1 for n in lengths]


def count_step(stores: Sequence[LayerStore]) -> None:
    """Count a token that every sequence of these layers has got, on the host and, in one launch, on the device."""
    for store in stores:
        store.advance(1)
    if counts := [store.counts for store in stores if store.counts is not None]:
        torch._foreach_add_(counts, 1)
