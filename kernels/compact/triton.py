"""`compact` on a GPU: one pass over the kept keys and values of all prompts, transformed and quantised on the way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvcompile.kernels.arguments import COLUMNS, SIZES, head_table, steps, tensors, unit_sizes
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs.integers.triton.sets import codec_at, codec_count, codec_sets
from kvcompile.kernels.codecs.integers.triton.storing import fill
from kvcompile.kernels.dispatch import on_device
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.tiles import of_head
from kvcompile.kernels.transform import Transform

ROW = tl.constexpr(len(COLUMNS))
CAPACITY, SLOT = (tl.constexpr(COLUMNS.index(name)) for name in ("capacity", "slot"))
K_CODEC, K_ROW, K_ANCHOR, K_CODES, K_SCALES, V_CODEC, V_ROW, V_ANCHOR, V_CODES, V_SCALES = (
    tl.constexpr(COLUMNS.index(f"{side}_{name}"))
    for side in "kv"
    for name in ("codec", "row", "anchor", "codes", "scales")
)
BLOCK = 16
"""Slots of a program; more of them, or more stages, and registers spill at head size 96."""
OPTIONS = {"num_warps": 4, "num_stages": 2, "maxnreg": 255}
"""Left alone, the compiler spills a register to fit one program more on a processor."""


@triton.jit
def _fill(prompt, matrix, mean, exact, codes, scales, anchor, codec, anchored, token, slot, valid, CODECS: tl.constexpr,
          D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, TRANSFORMED: tl.constexpr):  # fmt: skip
    """One side of a block of slots."""
    if codec == 0:
        d = tl.arange(0, DP)
        inside = valid[:, None] & (d < D)[None, :]
        vectors = tl.load(prompt + token[:, None] * D + d[None, :], mask=inside, other=0.0)
        tl.store(exact + slot[:, None].to(tl.int64) * D + d[None, :], vectors.to(exact.dtype.element_ty), mask=inside)
    else:
        first = valid & (slot == 0) & anchored
        for i in tl.static_range(codec_count(CODECS)):
            if codec == codec_at(CODECS, i):
                fill(prompt, matrix, mean, codes, scales, anchor, token, slot, valid, first, codec_at(CODECS, i), D, N,
                     TRANSFORMED)  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "slots", "count"])
def _compact(
    heads, tokens, seen_by, keys, values, k_matrix, k_mean, v_matrix, v_mean,
    k_exact, k_codes, k_scales, k_anchors, v_exact, v_codes, v_scales, v_anchors,
    k_rows, k_codes_step, k_scales_step, k_anchored, v_rows, v_codes_step, v_scales_step, v_anchored,
    slots, count, k_sequence, k_head, k_token, v_sequence, v_head, v_token,
    D: tl.constexpr, DP: tl.constexpr, KU: tl.constexpr, KS: tl.constexpr, VU: tl.constexpr, VS: tl.constexpr,
    K_CODECS: tl.constexpr, V_CODECS: tl.constexpr, N: tl.constexpr, TRANSFORMED: tl.constexpr,
):  # fmt: skip
    """Program (block of slots, head, sequence). A sequence has `slots` slots in `tokens`, and its prompt `count`
    columns; `k_sequence`, `k_head` and `k_token` are rows from one sequence, head and token to the next."""
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    row = heads + h * ROW
    kept = tl.minimum(tl.minimum(tl.load(row + CAPACITY), count), tl.load(seen_by + b))
    slot = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(0) * N >= kept:
        return
    valid = slot < kept
    token = tl.load(tokens + b * slots + tl.load(row + SLOT) + slot, mask=valid, other=0).to(tl.int64)
    k_anchor = tl.load(row + K_ANCHOR)
    _fill(keys + (b * k_sequence + h * k_head) * D, k_matrix + h * D * D, k_mean + h * D,
          *of_head(b, k_exact, k_codes, k_scales, k_anchors, k_rows, k_codes_step, k_scales_step, k_anchored,
                   tl.load(row + K_ROW), tl.load(row + K_CODES), tl.load(row + K_SCALES), k_anchor, D, KU, KS),
          tl.load(row + K_CODEC), k_anchor >= 0, token * k_token, slot, valid, K_CODECS, D, DP, N,
          TRANSFORMED)  # fmt: skip
    # Where values go is worked out here, and not before: registers are scarce in what fills keys.
    v_anchor = tl.load(row + V_ANCHOR)
    _fill(values + (b * v_sequence + h * v_head) * D, v_matrix + h * D * D, v_mean + h * D,
          *of_head(b, v_exact, v_codes, v_scales, v_anchors, v_rows, v_codes_step, v_scales_step, v_anchored,
                   tl.load(row + V_ROW), tl.load(row + V_CODES), tl.load(row + V_SCALES), v_anchor, D, VU, VS),
          tl.load(row + V_CODEC), v_anchor >= 0, token * v_token, slot, valid, V_CODECS, D, DP, N,
          TRANSFORMED)  # fmt: skip


def compact(
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    seen: Sequence[int] | torch.Tensor,
    transform: Transform | None,
) -> None:
    """See `api.compact`. `seen` is best an int32 tensor on the device: a list has to be copied there."""
    batch, heads, count, head_dim = new_keys.shape
    device = new_keys.device
    # Every slot of the layer in one list; those of a short prompt that stay empty are not read.
    places = torch.zeros(batch, layout.slots, dtype=torch.int32, device=device)
    for cls, token in zip(layout.classes, tokens, strict=True):
        own = places.narrow(1, layout.rows[cls.start].slot, cls.slots).unflatten(1, (cls.count, cls.capacity))
        own[:, :, : token.shape[2]] = token
    if not isinstance(seen, torch.Tensor):
        seen = torch.tensor(seen, dtype=torch.int32, device=device)
    new_keys, new_values = (new if _in_rows(new) else new.contiguous() for new in (new_keys, new_values))
    matrices = (new_keys,) * 4  # never read
    if transform is not None:
        matrices = (transform.key, transform.key_mean, transform.value, transform.value_mean)
    most = min(max(cls.capacity for cls in layout.classes), count)
    with on_device(device):
        _compact[(triton.cdiv(most, BLOCK), heads, batch)](
            head_table(layout, head_dim, device), places, seen, new_keys, new_values, *matrices,
            *tensors(keys), *tensors(values), *steps(keys), *steps(values), layout.slots, count,
            *(step // head_dim for new in (new_keys, new_values) for step in new.stride()[:3]),
            D=head_dim, DP=max(16, triton.next_power_of_2(head_dim)), N=BLOCK, TRANSFORMED=transform is not None,
            **unit_sizes(layout.side_codecs, head_dim), **codec_sets(layout.side_codecs), **OPTIONS,
        )  # fmt: skip


def _in_rows(new: torch.Tensor) -> bool:
    """Whether a prompt's vectors [B, H, n, D] lie in memory as rows of D numbers, in any order: then they are read
    where they are, without a copy of the whole prompt."""
    return new.stride(3) == 1 and all(step % new.shape[3] == 0 for step in new.stride()[:3])
