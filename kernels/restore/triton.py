"""`restore` on a GPU: one program a head and sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcompile.kernels.arguments import COLUMNS, head_table
from kvcompile.kernels.compiling import launch
from kvcompile.kernels.dispatch import on_device
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.overlap import let_next_begin, overlap, wait_for_previous
from kvcompile.kernels.transform import Transform

ROW = tl.constexpr(len(COLUMNS))
V_CODEC = tl.constexpr(COLUMNS.index("v_codec"))
STEP = tl.constexpr(32)


@triton.jit
def _restore(
    output, out, matrix, mean, heads,
    GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (head, sequence)."""
    h = tl.program_id(0)
    which = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + h
    r = tl.arange(0, R)
    e = tl.arange(0, DP)
    every = (r < GROUP)[:, None] & (e < D)[None, :]
    at = (which * GROUP + r)[:, None] * D
    let_next_begin(OVERLAP)
    codec = tl.load(heads + h * ROW + V_CODEC)
    wait_for_previous(OVERLAP)
    if codec == 0:  # nothing was transformed
        tl.store(out + at + e[None, :], tl.load(output + at + e[None, :], mask=every), mask=every)
        return
    total = tl.zeros([R, DP], tl.float32)
    for first in range(0, D, STEP):
        d = first + tl.arange(0, STEP)
        o = tl.load(output + at + d[None, :], mask=(r < GROUP)[:, None] & (d < D)[None, :], other=0.0)
        # Element (d, e) of the transpose of T^-1.
        inside = (d < D)[:, None] & (e < D)[None, :]
        part = tl.load(matrix + h * D * D + e[None, :] * D + d[:, None], mask=inside, other=0.0)
        total += tl.dot(o.to(tl.float32), part, input_precision="tf32x3")
    total += tl.load(mean + h * D + e, mask=e < D, other=0.0)[None, :]
    tl.store(out + at + e[None, :], total, mask=every)


def restore(output: torch.Tensor, transform: Transform, layout: LayerLayout) -> torch.Tensor:
    """See `api.restore`."""
    batch, query_heads, _, head_dim = output.shape
    heads, device = layout.num_kv_heads, output.device
    group = query_heads // heads
    out = torch.empty_like(output, memory_format=torch.contiguous_format)
    with on_device(device):
        launch(
            _restore, (heads, batch),
            output.contiguous(), out, transform.value_inverse.contiguous(), transform.value_mean,
            head_table(layout, head_dim, device), GROUP=group, R=max(16, triton.next_power_of_2(group)), D=head_dim,
            DP=max(32, triton.next_power_of_2(head_dim)),
            **overlap(device), num_warps=4,
        )  # fmt: skip
    return out
