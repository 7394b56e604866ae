"""`silu_mul` on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcompile.kernels.compiling import launch
from kvcompile.kernels.dispatch import on_device
from kvcompile.kernels.overlap import let_next_begin, overlap, wait_for_previous

BLOCK = 1024


@triton.jit
def _silu_mul(gate_up, out, size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Program (block of elements, row)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = i < size
    let_next_begin(OVERLAP)
    wait_for_previous(OVERLAP)
    at = gate_up + row * 2 * size + i
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)  # rounded as the model's own would be
    tl.store(out + row * size + i, activated * up, mask=inside)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `api.silu_mul`."""
    count, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(count, size)
    with on_device(gate_up.device):
        launch(
            _silu_mul, (triton.cdiv(size, BLOCK), count),
            gate_up.contiguous(), out, size, BLOCK=BLOCK, **overlap(gate_up.device), num_warps=4,
        )  # fmt: skip
    return out
