"""`add_norm` in torch."""

from __future__ import annotations

import torch


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `api.add_norm`."""
    total = residual if delta is None else residual + delta
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return total, weight * normed.to(total.dtype)
