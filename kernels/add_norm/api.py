"""A residual sum and its norm: the entry point."""

from __future__ import annotations

import torch

from kvcompile.kernels.add_norm import dense
from kvcompile.kernels.dispatch import prefers_kernels


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual` + `delta` [B, d] (None: nothing is added), and its root mean square norm (arXiv 1910.07467) times
    `weight` [d]; squares are summed in float32. Both in the dtype of `residual`."""
    if prefers_kernels(residual):
        from kvcompile.kernels.add_norm import triton

        return triton.add_norm(residual, delta, weight, epsilon)
    return dense.add_norm(residual, delta, weight, epsilon)
