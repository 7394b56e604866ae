"""`compact` in torch."""

from __future__ import annotations

import torch


def compact(store: torch.Tensor, prompt: torch.Tensor, token: torch.Tensor) -> None:
    """See `api.compact`."""
    index = token.unsqueeze(2).expand(*token.shape, prompt.shape[2])
    store[:, : token.shape[1]].copy_(prompt.gather(1, index))
