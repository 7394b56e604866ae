"""The gated activation of an MLP: the entry point."""

from __future__ import annotations

import torch

from kvcompile.kernels.dispatch import prefers_kernels
from kvcompile.kernels.silu_mul import dense


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) times up (SwiGLU, arXiv 2002.05202), [B, n] of `gate_up` [B, 2 n], gate before up."""
    if prefers_kernels(gate_up):
        from kvcompile.kernels.silu_mul import triton

        return triton.silu_mul(gate_up)
    return dense.silu_mul(gate_up)
