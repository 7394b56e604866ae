"""Attention over transformed values, transformed back: the entry point."""

from __future__ import annotations

import torch

from kvcompile.kernels.dispatch import takes_kernels
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.transform import Transform


def restore(output: torch.Tensor, transform: Transform, layout: LayerLayout) -> torch.Tensor:
    """T^-1 o + mean for o [B, Hq, 1, D] of a step, in its dtype: `Transform.outputs`."""
    if takes_kernels(output, layout):
        from kvcompile.kernels.restore import triton

        return triton.restore(output, transform, layout)
    return transform.outputs(output)
