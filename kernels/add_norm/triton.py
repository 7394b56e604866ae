"""`add_norm` on a GPU: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcompile.kernels.compiling import launch
from kvcompile.kernels.dispatch import on_device
from kvcompile.kernels.overlap import let_next_begin, overlap, wait_for_previous


@triton.jit
def _add_norm(
    residual, delta, weight, total, out, epsilon, size,
    ADDED: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (row), whose `size` elements fit one block."""
    i = tl.arange(0, BLOCK)
    at = tl.program_id(0) * size + i
    inside = i < size
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    x = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, x, mask=inside)
    dtype: tl.constexpr = out.dtype.element_ty
    x = x.to(dtype).to(tl.float32)  # the sum as it is stored
    normed = x / tl.sqrt_rn(tl.sum(x * x, 0) / size + epsilon)
    scaled = normed.to(dtype).to(tl.float32) * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, scaled, mask=inside)


def add_norm(
    residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `api.add_norm`."""
    count, size = residual.shape
    out = torch.empty_like(residual)
    total = residual if delta is None else torch.empty_like(residual)
    block = triton.next_power_of_2(size)
    with on_device(residual.device):
        launch(
            _add_norm, (count,),
            residual, residual if delta is None else delta, weight, total, out, epsilon, size, ADDED=delta is not None,
            BLOCK=block, **overlap(residual.device), num_warps=4 if block <= 4096 else 8,
        )  # fmt: skip
    return total, out
