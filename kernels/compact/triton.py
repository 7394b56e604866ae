"""`compact` on a GPU: one pass over a prompt's keys and values, turned and rounded on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvcompile.kernels.buffers import Stored
from kvcompile.kernels.layout import HeadRow, LayerLayout
from kvcompile.kernels.transform import Turn

ROW = tl.constexpr(len(HeadRow._fields))
CAPACITY, SLOT, K_WIDTH, K_ROW, K_ANCHOR, V_WIDTH, V_ROW, V_ANCHOR = (
    tl.constexpr(HeadRow._fields.index(name))
    for name in ("capacity", "slot", "k_width", "k_row", "k_anchor", "v_width", "v_row", "v_anchor")
)
BLOCK, WARPS, STAGES = 16, 4, 2
"""Slots of a program; more of them, or more stages, and registers spill at head size 96."""
TINY = tl.constexpr(torch.finfo(torch.float16).tiny)
HUGE = tl.constexpr(torch.finfo(torch.float16).max)


@triton.jit
def _part(prompt, token, there, matrix, mean, first, STEP: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr,
          D: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Elements first, first + STEP, ... of the tokens' vectors, turned: f32 [slots, P]."""
    e = tl.arange(0, P)
    if TURNED:
        total = tl.zeros([N, P], tl.float32)
        for start in range(0, D, 32):
            d = start + tl.arange(0, 32)
            inside = there[:, None] & (d < D)[None, :]
            x = tl.load(prompt + token[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - tl.load(mean + d, mask=d < D, other=0.0)[None, :], 0.0)
            rows = (e < COUNT)[None, :] & (d < D)[:, None]
            turn = tl.load(matrix + (first + e * STEP)[None, :] * D + d[:, None], mask=rows, other=0.0)
            total += tl.dot(x, turn, input_precision="tf32x3")  # three products that give float32's precision
        return total
    mask = there[:, None] & (e < COUNT)[None, :]
    return tl.load(prompt + token[:, None] * D + (first + e * STEP)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _scale(largest, HALF: tl.constexpr):
    return tl.minimum(tl.maximum(largest / HALF, TINY), HUGE).to(tl.float16)


@triton.jit
def _code(x, scale, HALF: tl.constexpr):
    code = tl.floor(tl.div_rn(x, scale.to(tl.float32)[:, None] + x * 0.0))
    return (tl.minimum(tl.maximum(code, -HALF), HALF - 1) + HALF).to(tl.uint8)


@triton.jit
def _fill8(prompt, matrix, mean, codes, scales, anchor, token, slot, there, first, D: tl.constexpr,
           G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """A block of slots rounded to 8 bits, and the row that is token 0 of a sink (`first`) exactly."""
    SIZE: tl.constexpr = D // G
    e = tl.arange(0, P)
    inside = (e < SIZE)[None, :]
    for g in range(G):
        x = _part(prompt, token, there, matrix, mean, g * SIZE, 1, SIZE, P, D, N, TURNED)
        scale = _scale(tl.max(tl.abs(x), 1), 128.0)
        tl.store(scales + slot * G + g, scale, mask=there)
        tl.store(
            codes + slot[:, None] * D + g * SIZE + e[None, :], _code(x, scale, 128.0), mask=there[:, None] & inside
        )
        at = anchor + slot[:, None] * 0 + g * SIZE + e[None, :]
        tl.store(at, x.to(anchor.dtype.element_ty), mask=first[:, None] & inside)


@triton.jit
def _fill4(prompt, matrix, mean, codes, scales, anchor, token, slot, there, first, D: tl.constexpr,
           G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """The same to 4 bits, two codes a byte."""
    SIZE: tl.constexpr = D // G
    HALF: tl.constexpr = SIZE // 2
    e = tl.arange(0, P)
    inside = (e < HALF)[None, :]
    for g in range(G):
        even = _part(prompt, token, there, matrix, mean, g * SIZE, 2, HALF, P, D, N, TURNED)
        odd = _part(prompt, token, there, matrix, mean, g * SIZE + 1, 2, HALF, P, D, N, TURNED)
        scale = _scale(tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1), 8.0)
        tl.store(scales + slot * G + g, scale, mask=there)
        packed = _code(even, scale, 8.0) | (_code(odd, scale, 8.0) << 4)
        tl.store(codes + slot[:, None] * (D // 2) + g * HALF + e[None, :], packed, mask=there[:, None] & inside)
        at = anchor + slot[:, None] * 0 + g * SIZE + 2 * e[None, :]
        tl.store(at, even.to(anchor.dtype.element_ty), mask=first[:, None] & inside)
        tl.store(at + 1, odd.to(anchor.dtype.element_ty), mask=first[:, None] & inside)


@triton.jit
def _fill(prompt, matrix, mean, exact, codes8, scales8, codes4, scales4, anchor, width, row, anchored, token, slot,
          there, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P8: tl.constexpr, P4: tl.constexpr,
          N: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """One side of a block of slots."""
    if width == 0:
        d = tl.arange(0, DP)
        inside = there[:, None] & (d < D)[None, :]
        vectors = tl.load(prompt + token[:, None] * D + d[None, :], mask=inside, other=0.0)
        tl.store(exact + (row + slot)[:, None] * D + d[None, :], vectors.to(exact.dtype.element_ty), mask=inside)
    else:
        first = there & (slot == 0) & anchored
        if width == 8:
            _fill8(prompt, matrix, mean, codes8 + row * D, scales8 + row * G, anchor, token, slot, there, first,
                   D, G, P8, N, TURNED)  # fmt: skip
        else:
            _fill4(prompt, matrix, mean, codes4 + row * (D // 2), scales4 + row * G, anchor, token, slot, there, first,
                   D, G, P4, N, TURNED)  # fmt: skip


@triton.jit
def _compact(
    heads, tokens, keys, values, k_matrix, k_mean, v_matrix, v_mean,
    k_exact, k_codes8, k_scales8, k_codes4, k_scales4, k_anchors,
    v_exact, v_codes8, v_scales8, v_codes4, v_scales4, v_anchors, count,
    D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P8: tl.constexpr, P4: tl.constexpr, N: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Program (block of slots, head) of one sequence, whose buffers these are; its prompt has `count` tokens."""
    h = tl.program_id(1).to(tl.int64)
    row = heads + h * ROW
    kept = tl.minimum(tl.load(row + CAPACITY), count)
    slot = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(0) * N >= kept:
        return
    there = slot < kept
    token = tl.load(tokens + tl.load(row + SLOT) + slot, mask=there, other=0).to(tl.int64)
    k_row, v_row = tl.load(row + K_ROW).to(tl.int64), tl.load(row + V_ROW).to(tl.int64)
    k_anchor, v_anchor = tl.load(row + K_ANCHOR), tl.load(row + V_ANCHOR)
    _fill(keys + h * count * D, k_matrix + h * D * D, k_mean + h * D, k_exact, k_codes8, k_scales8, k_codes4, k_scales4,
          k_anchors + k_anchor * D, tl.load(row + K_WIDTH), k_row, k_anchor >= 0, token, slot, there,
          D, DP, G, P8, P4, N, TURNED)  # fmt: skip
    _fill(values + h * count * D, v_matrix + h * D * D, v_mean + h * D, v_exact, v_codes8, v_scales8, v_codes4,
          v_scales4, v_anchors + v_anchor * D, tl.load(row + V_WIDTH), v_row, v_anchor >= 0, token, slot,
          there, D, DP, G, P8, P4, N, TURNED)  # fmt: skip


def compact(
    keys: Stored,
    values: Stored,
    layout: LayerLayout,
    sequence: int,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    turn: Turn | None,
) -> None:
    """See `api.compact`."""
    heads, count, head_dim = new_keys.shape
    device = new_keys.device
    key = ("compact rows", device)
    if key not in layout.memo:
        layout.memo[key] = torch.tensor(layout.rows, dtype=torch.int32, device=device)
    # Every slot of the layer in one list; those of a short prompt that stay empty are not read.
    places = torch.zeros(layout.slots, dtype=torch.int32, device=device)
    for cls, token in zip(layout.classes, tokens, strict=True):
        first = layout.rows[cls.start].slot
        places[first : first + cls.slots].view(cls.count, cls.capacity)[:, : token.shape[1]] = token
    groups = keys.scales[8].shape[2]
    buffers = [
        tuple(t[sequence] for t in (s.exact, s.codes[8], s.scales[8], s.codes[4], s.scales[4], s.anchors))
        for s in (keys, values)
    ]
    matrices = (turn.key, turn.key_mean, turn.value, turn.value_mean) if turn is not None else (new_keys,) * 4
    most = min(max(cls.capacity for cls in layout.classes), count)
    _compact[(triton.cdiv(most, BLOCK), heads)](
        layout.memo[key], places, new_keys.contiguous(), new_values.contiguous(), *matrices, *buffers[0], *buffers[1],
        count, D=head_dim, DP=max(16, triton.next_power_of_2(head_dim)), G=groups,
        P8=max(16, triton.next_power_of_2(head_dim // groups)),
        P4=max(16, triton.next_power_of_2(head_dim // groups // 2)), N=BLOCK,
        TURNED=turn is not None, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
