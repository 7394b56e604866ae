"""`new_token` on a GPU: one launch for all that happens to a token, two programs a head and sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvcompile.kernels.append.triton import K_CODEC, KIND, ROW, SCORED, V_CODEC, WARPS, constants, store_token
from kvcompile.kernels.arguments import SIZES, UNITS, head_table, in_order, steps, tensors, unit_sizes
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.compiling import launch
from kvcompile.kernels.dispatch import on_device
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.new_token.parts import HeadNorms, LinearScorer
from kvcompile.kernels.overlap import let_next_begin, overlap, wait_for_previous
from kvcompile.kernels.transform import Transform

STEP = tl.constexpr(32)
"""Elements of a vector that meet a matrix at a time."""
OPTIONS = {"num_warps": WARPS, "num_stages": 2, "maxnreg": 255}
"""There are few programs, so that each may have all registers."""


@triton.jit
def _rotated(x, d, valid, factor, weight, cos, sin, D: tl.constexpr, NORMS: tl.constexpr, DTYPE: tl.constexpr):
    """Elements `d` of the vectors at `x` (pointers, `factor` of each that norms it), after norm and rotary embedding,
    rounded as the model would."""
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)
    one = tl.load(x + d, mask=valid, other=0.0).to(tl.float32)
    two = tl.load(x + other, mask=valid, other=0.0).to(tl.float32)
    if NORMS:
        one = (one * factor).to(DTYPE).to(tl.float32) * tl.load(weight + d, mask=valid, other=0.0).to(tl.float32)
        two = (two * factor).to(DTYPE).to(tl.float32) * tl.load(weight + other, mask=valid, other=0.0).to(tl.float32)
    c = tl.load(cos + d, mask=valid, other=0.0).to(tl.float32)
    s = tl.load(sin + d, mask=valid, other=0.0).to(tl.float32)
    return (one * c + tl.where(d < D // 2, -two, two) * s).to(DTYPE).to(tl.float32)


@triton.jit
def _factor(x, mask, epsilon, AXIS: tl.constexpr, D: tl.constexpr):
    """1 / sqrt(mean of squares + epsilon) of the vectors at `x`."""
    square = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    return 1.0 / tl.sqrt_rn(tl.sum(square * square, AXIS) / D + epsilon)


@triton.jit
def _put_queries(
    query, out, codec, matrix, weight, cos, sin, epsilon,
    D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, NORMS: tl.constexpr,
    TRANSFORMED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The GROUP queries of a head at `query` to `out`, as q T^-1 where its keys are quantised."""
    r = tl.arange(0, R)
    e = tl.arange(0, DP)
    mine = r < GROUP
    every = mine[:, None] & (e < D)[None, :]
    at = query + r[:, None] * D
    factor = _factor(at + e[None, :], every, epsilon, 1, D)[:, None] if NORMS else 1.0
    quantised = codec != 0
    if TRANSFORMED and quantised:
        total = tl.zeros([R, DP], tl.float32)
        for first in range(0, D, STEP):
            d = first + tl.arange(0, STEP)
            valid = mine[:, None] & (d < D)[None, :]
            q = _rotated(at, d[None, :], valid, factor, weight, cos, sin, D, NORMS, DTYPE)
            inside = (d < D)[:, None] & (e < D)[None, :]
            part = tl.load(matrix + d[:, None] * D + e[None, :], mask=inside, other=0.0)
            total += tl.dot(q, part, input_precision="tf32x3")
        tl.store(out + r[:, None] * D + e[None, :], total, mask=every)
    else:
        q = _rotated(at, e[None, :], every, factor, weight, cos, sin, D, NORMS, DTYPE)
        tl.store(out + r[:, None] * D + e[None, :], q, mask=every)


@triton.jit
def _put_vector(
    x, out, codec, matrix, mean, weight, cos, sin, epsilon,
    D: tl.constexpr, DP: tl.constexpr, ROTATED: tl.constexpr, NORMS: tl.constexpr, TRANSFORMED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The key (rotary embedding included) or value at `x` to `out`, as T (x - mean) where it is quantised."""
    e = tl.arange(0, DP)
    inside = e < D
    factor = _factor(x + e, inside, epsilon, 0, D) if NORMS else 1.0
    quantised = codec != 0
    if TRANSFORMED and quantised:
        total = tl.zeros([DP], tl.float32)
        for first in range(0, D, STEP):
            d = first + tl.arange(0, STEP)
            valid = d < D
            if ROTATED:
                part = _rotated(x, d, valid, factor, weight, cos, sin, D, NORMS, DTYPE)
            else:
                part = tl.load(x + d, mask=valid, other=0.0).to(tl.float32)
            part = tl.where(valid, part - tl.load(mean + d, mask=valid, other=0.0), 0.0)
            columns = tl.load(matrix + e[:, None] * D + d[None, :], mask=inside[:, None] & valid[None, :], other=0.0)
            total += tl.sum(columns * part[None, :], 1)
        tl.store(out + e, total, mask=inside)
    elif ROTATED:
        tl.store(out + e, _rotated(x, e, inside, factor, weight, cos, sin, D, NORMS, DTYPE), mask=inside)
    else:
        tl.store(out + e, tl.load(x + e, mask=inside), mask=inside)


@triton.jit(do_not_specialize=[*SIZES, *UNITS, "scored_stride"])
def _new_token(
    qkv, cos, sin, q_norm, k_norm, hidden, scorer, bias, k_inverse, k_matrix, k_mean, v_matrix, v_mean,
    query, new_keys, new_values, epsilon, size, heads, seen_by, places, scores,
    k_exact, k_codes, k_scales, k_anchors, v_exact, v_codes, v_scales, v_anchors,
    k_rows, k_codes_step, k_scales_step, k_anchored, v_rows, v_codes_step, v_scales_step, v_anchored, scored_stride,
    k_codes_unit, k_scales_unit, v_codes_unit, v_scales_unit,
    GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, K_CODECS: tl.constexpr,
    V_CODECS: tl.constexpr, SCORES: tl.constexpr, BLOCK: tl.constexpr, NORMS: tl.constexpr,
    TRANSFORMED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (head, sequence, 0 for the queries or 1 for the rest); `size` elements of `hidden` a sequence."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(0)
    dtype: tl.constexpr = qkv.dtype.element_ty
    row = heads + h * ROW
    let_next_begin(OVERLAP)
    k_codec, v_codec = tl.load(row + K_CODEC), tl.load(row + V_CODEC)
    wait_for_previous(OVERLAP)
    token = qkv + b * num_heads * (GROUP + 2) * D
    cos += b * D
    sin += b * D
    which = b * num_heads + h
    if tl.program_id(2) == 0:
        _put_queries(
            token + h * GROUP * D, query + which * GROUP * D, k_codec, k_inverse + h * D * D, q_norm, cos, sin, epsilon,
            D, DP, GROUP, R, NORMS, TRANSFORMED, dtype,
        )  # fmt: skip
        return
    _put_vector(
        token + (num_heads * GROUP + h) * D, new_keys + which * D, k_codec, k_matrix + h * D * D, k_mean + h * D,
        k_norm, cos, sin, epsilon, D, DP, True, NORMS, TRANSFORMED, dtype,
    )  # fmt: skip
    _put_vector(
        token + (num_heads * (GROUP + 1) + h) * D, new_values + which * D, v_codec, v_matrix + h * D * D,
        v_mean + h * D, k_norm, cos, sin, epsilon, D, DP, False, False, TRANSFORMED, dtype,
    )  # fmt: skip
    score = 0.0
    if SCORES:
        if tl.load(row + KIND) == SCORED:
            total = tl.zeros([BLOCK], tl.float32)
            for first in tl.range(0, size, BLOCK, loop_unroll_factor=4):  # loads that do not wait for each other
                i = first + tl.arange(0, BLOCK)
                x = tl.load(hidden + b * size + i, mask=i < size, other=0.0).to(tl.float32)
                total += x * tl.load(scorer + h * size + i, mask=i < size, other=0.0)
            score = tl.sum(total, 0) + tl.load(bias + h)
    tl.debug_barrier()  # the vectors are read by other threads than have written them
    store_token(
        b, h, heads, seen_by, places, new_keys + which * D, new_values + which * D, score, scores,
        k_exact, k_codes, k_scales, k_anchors, v_exact, v_codes, v_scales, v_anchors,
        k_rows, k_codes_step, k_scales_step, k_anchored, v_rows, v_codes_step, v_scales_step, v_anchored, scored_stride,
        k_codes_unit, k_scales_unit, v_codes_unit, v_scales_unit, D, DP, K_CODECS, V_CODECS, SCORES, BLOCK,
    )  # fmt: skip


def new_token(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    scores: torch.Tensor,
    layout: LayerLayout,
    seen: Sequence[int] | torch.Tensor,
    transform: Transform | None,
    norms: HeadNorms | None,
    hidden: torch.Tensor | None,
    scorer: LinearScorer | None,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `api.new_token`. `seen` is best an int32 tensor on the device: a list has to be copied there."""
    batch, heads, head_dim, device = len(qkv), layout.num_kv_heads, keys.head_dim, qkv.device
    group = qkv.shape[1] // head_dim // heads - 2
    if not isinstance(seen, torch.Tensor):
        seen = torch.tensor(seen, dtype=torch.int32, device=device)
    query = qkv.new_empty(batch, heads * group, 1, head_dim)
    new = qkv.new_empty(2, batch, heads, head_dim)
    unused = qkv  # in the place of what is never read
    matrices: tuple[torch.Tensor, ...] = (unused,) * 5
    if transform is not None:
        used = (transform.key_inverse, transform.key, transform.key_mean, transform.value, transform.value_mean)
        matrices = tuple(matrix.contiguous() for matrix in used)
    scored = (unused,) * 3 if scorer is None or hidden is None else (hidden.contiguous(), *scorer)
    places = in_order(layout, batch, device) if places is None else places
    with on_device(device):
        launch(
            _new_token, (heads, batch, 2),
            qkv.contiguous(), cos.contiguous(), sin.contiguous(), *((unused,) * 2 if norms is None else norms[:2]),
            *scored, *matrices, query, *new, 0.0 if norms is None else norms.epsilon, scored[0].shape[1],
            head_table(layout, head_dim, device), seen, places, scores, *tensors(keys), *tensors(values), *steps(keys),
            *steps(values), scores.stride(0), *unit_sizes(layout.side_codecs, head_dim).values(),
            GROUP=group, R=max(16, triton.next_power_of_2(group)),
            **constants(head_dim, layout.side_codecs), SCORES=layout.scored_slots > 0, NORMS=norms is not None,
            TRANSFORMED=transform is not None, **OPTIONS, **overlap(device),
        )  # fmt: skip
    return query
