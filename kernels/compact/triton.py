"""`compact` on a GPU: one pass over a prompt's keys and values, transformed and quantised on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvcompile.kernels.arguments import groups, head_table, tensors
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs.int4.triton import fill4
from kvcompile.kernels.codecs.int8.triton import INT8, fill8
from kvcompile.kernels.dispatch import on_device
from kvcompile.kernels.layout import HeadRow, LayerLayout
from kvcompile.kernels.transform import Transform

ROW = tl.constexpr(len(HeadRow._fields))
CAPACITY, SLOT, K_CODEC, K_ROW, K_ANCHOR, V_CODEC, V_ROW, V_ANCHOR = (
    tl.constexpr(HeadRow._fields.index(name))
    for name in ("capacity", "slot", "k_codec", "k_row", "k_anchor", "v_codec", "v_row", "v_anchor")
)
BLOCK, WARPS, STAGES = 16, 4, 2
"""Slots of a program; more of them, or more stages, and registers spill at head size 96."""


@triton.jit
def _fill(prompt, matrix, mean, exact, codes8, scales8, codes4, scales4, anchor, codec, row, anchored, token, slot,
          valid, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P8: tl.constexpr, P4: tl.constexpr,
          N: tl.constexpr, TRANSFORMED: tl.constexpr):  # fmt: skip
    """One side of a block of slots."""
    if codec == 0:
        d = tl.arange(0, DP)
        inside = valid[:, None] & (d < D)[None, :]
        vectors = tl.load(prompt + token[:, None] * D + d[None, :], mask=inside, other=0.0)
        tl.store(exact + (row + slot)[:, None] * D + d[None, :], vectors.to(exact.dtype.element_ty), mask=inside)
    else:
        first = valid & (slot == 0) & anchored
        if codec == INT8:
            fill8(prompt, matrix, mean, codes8 + row * D, scales8 + row * G, anchor, token, slot, valid, first,
                  D, G, P8, N, TRANSFORMED)  # fmt: skip
        else:
            fill4(prompt, matrix, mean, codes4 + row * (D // 2), scales4 + row * G, anchor, token, slot, valid, first,
                  D, G, P4, N, TRANSFORMED)  # fmt: skip


@triton.jit
def _compact(
    heads, tokens, keys, values, k_matrix, k_mean, v_matrix, v_mean,
    k_exact, k_codes8, k_scales8, k_codes4, k_scales4, k_anchors,
    v_exact, v_codes8, v_scales8, v_codes4, v_scales4, v_anchors, count,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P8: tl.constexpr, P4: tl.constexpr, N: tl.constexpr,
    TRANSFORMED: tl.constexpr,
):  # fmt: skip
    """Program (block of slots, head) of one sequence, whose buffers these are; its prompt has `count` tokens."""
    h = tl.program_id(1).to(tl.int64)
    row = heads + h * ROW
    kept = tl.minimum(tl.load(row + CAPACITY), count)
    slot = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(0) * N >= kept:
        return
    valid = slot < kept
    token = tl.load(tokens + tl.load(row + SLOT) + slot, mask=valid, other=0).to(tl.int64)
    k_row, v_row = tl.load(row + K_ROW).to(tl.int64), tl.load(row + V_ROW).to(tl.int64)
    k_anchor, v_anchor = tl.load(row + K_ANCHOR), tl.load(row + V_ANCHOR)
    _fill(keys + h * count * D, k_matrix + h * D * D, k_mean + h * D, k_exact, k_codes8, k_scales8, k_codes4, k_scales4,
          k_anchors + k_anchor * D, tl.load(row + K_CODEC), k_row, k_anchor >= 0, token, slot, valid,
          D, DP, G, P8, P4, N, TRANSFORMED)  # fmt: skip
    _fill(values + h * count * D, v_matrix + h * D * D, v_mean + h * D, v_exact, v_codes8, v_scales8, v_codes4,
          v_scales4, v_anchors + v_anchor * D, tl.load(row + V_CODEC), v_row, v_anchor >= 0, token, slot,
          valid, D, DP, G, P8, P4, N, TRANSFORMED)  # fmt: skip


def compact(
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    sequence: int,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    transform: Transform | None,
) -> None:
    """See `api.compact`."""
    heads, count, head_dim = new_keys.shape
    device = new_keys.device
    # Every slot of the layer in one list; those of a short prompt that stay empty are not read.
    places = torch.zeros(layout.slots, dtype=torch.int32, device=device)
    for cls, token in zip(layout.classes, tokens, strict=True):
        first = layout.rows[cls.start].slot
        places[first : first + cls.slots].view(cls.count, cls.capacity)[:, : token.shape[1]] = token
    matrices = (new_keys,) * 4  # never read
    if transform is not None:
        matrices = (transform.key, transform.key_mean, transform.value, transform.value_mean)
    parts = groups(head_dim)
    most = min(max(cls.capacity for cls in layout.classes), count)
    with on_device(device):
        _compact[(triton.cdiv(most, BLOCK), heads)](
            head_table(layout, device), places, new_keys.contiguous(), new_values.contiguous(), *matrices,
            *(t[sequence] for side in (keys, values) for t in tensors(side)), count,
            D=head_dim, DP=max(16, triton.next_power_of_2(head_dim)), G=parts,
            P8=max(16, triton.next_power_of_2(head_dim // parts)),
            P4=max(16, triton.next_power_of_2(head_dim // parts // 2)), N=BLOCK,
            TRANSFORMED=transform is not None, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
