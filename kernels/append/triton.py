"""`append` on a GPU: one program a head and sequence finds the victim, quantises and writes; the host is not asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import triton
import triton.language as tl

from kvcompile.kernels.arguments import COLUMNS, SIZES, UNITS, head_table, in_order, steps, tensors, unit_sizes
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs.integers.triton.sets import codec_at, codec_count, codec_sets
from kvcompile.kernels.codecs.integers.triton.storing import copy, move, put
from kvcompile.kernels.compiling import launch
from kvcompile.kernels.dispatch import on_device
from kvcompile.kernels.layout import OTHER as OTHER_KIND
from kvcompile.kernels.layout import SCORED as SCORED_KIND
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.tiles import of_head

ROW = tl.constexpr(len(COLUMNS))
CAPACITY, SINK, RECENT, KIND, SCORE = (
    tl.constexpr(COLUMNS.index(name)) for name in ("capacity", "sink", "recent", "kind", "score")
)
K_CODEC, K_ROW, K_ANCHOR, K_CODES, K_SCALES, V_CODEC, V_ROW, V_ANCHOR, V_CODES, V_SCALES = (
    tl.constexpr(COLUMNS.index(f"{side}_{name}"))
    for side in "kv"
    for name in ("codec", "row", "anchor", "codes", "scales")
)
BLOCK, WARPS = 1024, 4
"""Scores that a program looks at in one step."""
TOGETHER = tl.constexpr(8)
"""Scores that a thread reads with one load."""
OTHER, SCORED = tl.constexpr(OTHER_KIND), tl.constexpr(SCORED_KIND)


@triton.jit
def _put(x, exact, codes, scales, anchor, codec, slot, anchored, CODECS: tl.constexpr, D: tl.constexpr,
         DP: tl.constexpr):  # fmt: skip
    """Store the vector at `x` in its slot, in the head's codec; and exactly where it is `anchored`."""
    d = tl.arange(0, DP)
    if anchored:
        tl.store(anchor + d, tl.load(x + d, mask=d < D).to(anchor.dtype.element_ty), mask=d < D)
    if codec == 0:
        tl.store(exact + slot * D + d, tl.load(x + d, mask=d < D).to(exact.dtype.element_ty), mask=d < D)
    for i in tl.static_range(codec_count(CODECS)):
        if codec == codec_at(CODECS, i):
            put(x, codes, scales, slot, codec_at(CODECS, i), D)


@triton.jit
def _move(exact, codes, scales, codec, slot, step, CODECS: tl.constexpr, D: tl.constexpr):
    """Copy what is in a slot to the one `step` slots on."""
    if codec == 0:
        copy(exact + slot * D, step * D, D)
    for i in tl.static_range(codec_count(CODECS)):
        if codec == codec_at(CODECS, i):
            move(codes, scales, slot, step, codec_at(CODECS, i), D)


@triton.jit
def worst_score(scores, offset, start, stop, BLOCK: tl.constexpr):
    """The lowest of the scores [start, stop), which lie at `scores + offset`, and its slot, of equally low ones the
    last: the lower slot stays. Every thread keeps the lowest of its own places, so that no block of scores waits for
    the one before, and reads `TOGETHER` of them at a time, but for the first and the last few."""
    shift = (offset % TOGETHER).to(tl.int32)
    aligned = scores + offset // TOGETHER * TOGETHER
    start += shift
    stop += shift
    low = tl.minimum((start + TOGETHER - 1) // TOGETHER * TOGETHER, stop)
    high = stop // TOGETHER * TOGETHER
    few = tl.arange(0, 2 * TOGETHER)
    edge = tl.where(few < TOGETHER, start + few, tl.maximum(high, low) + few - TOGETHER)
    inside = edge < tl.where(few < TOGETHER, low, stop)
    ends = tl.load(aligned + edge, mask=inside, other=float("inf")).to(tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    for first in tl.range((start + TOGETHER - 1) // TOGETHER * TOGETHER, high, BLOCK, loop_unroll_factor=4):
        i = first + tl.arange(0, BLOCK)
        s = tl.load(aligned + i, mask=i < high, other=float("inf")).to(tl.float32)
        lower = (s <= lowest) & (i < high)
        at = tl.where(lower, i, at)
        lowest = tl.minimum(lowest, s)
    worst = tl.minimum(tl.min(lowest, 0), tl.min(ends, 0))
    last = tl.max(tl.where(lowest == worst, at, 0), 0)
    return worst, tl.maximum(last, tl.max(tl.where(inside & (ends == worst), edge, 0), 0)) - shift


@triton.jit
def store_token(
    b, h, heads, seen_by, places, new_key, new_value, score, scores,
    k_exact, k_codes, k_scales, k_anchors, v_exact, v_codes, v_scales, v_anchors,
    k_rows, k_codes_step, k_scales_step, k_anchored, v_rows, v_codes_step, v_scales_step, v_anchored, scored_stride,
    k_codes_unit, k_scales_unit, v_codes_unit, v_scales_unit,
    D: tl.constexpr, DP: tl.constexpr, K_CODECS: tl.constexpr, V_CODECS: tl.constexpr, SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One head's new token of sequence b: the vectors at `new_key` and `new_value`, and `score`, a number."""
    row = heads + h * ROW
    n = tl.load(seen_by + b)
    b = tl.load(places + b).to(tl.int64)
    capacity = tl.load(row + CAPACITY)
    recent = tl.load(row + RECENT)
    slot = tl.where(n < capacity, n, capacity - recent + (n - capacity) % recent)
    k_codec, v_codec = tl.load(row + K_CODEC), tl.load(row + V_CODEC)
    k_anchor, v_anchor = tl.load(row + K_ANCHOR), tl.load(row + V_ANCHOR)
    k_exact, k_codes, k_scales, k_anchors = of_head(
        b, k_exact, k_codes, k_scales, k_anchors, k_rows, k_codes_step, k_scales_step, k_anchored,
        tl.load(row + K_ROW), tl.load(row + K_CODES), tl.load(row + K_SCALES), k_anchor, D,
        k_codes_unit, k_scales_unit,
    )  # fmt: skip
    v_exact, v_codes, v_scales, v_anchors = of_head(
        b, v_exact, v_codes, v_scales, v_anchors, v_rows, v_codes_step, v_scales_step, v_anchored,
        tl.load(row + V_ROW), tl.load(row + V_CODES), tl.load(row + V_SCALES), v_anchor, D,
        v_codes_unit, v_scales_unit,
    )  # fmt: skip
    at = slot.to(tl.int64)
    if SCORES:
        if tl.load(row + KIND) == SCORED:
            offset = b * scored_stride + tl.load(row + SCORE)
            held = scores + offset
            leaving = tl.load(held + slot).to(tl.float32)
            sink = tl.load(row + SINK)
            last = tl.where(n < capacity, sink, capacity - recent)  # a head that is not full loses nothing
            worst, victim = worst_score(scores, offset, sink, last, BLOCK)
            tl.debug_barrier()  # all have read before anything is written
            if leaving > worst:
                step = (victim - slot).to(tl.int64)
                _move(k_exact, k_codes, k_scales, k_codec, at, step, K_CODECS, D)
                _move(v_exact, v_codes, v_scales, v_codec, at, step, V_CODECS, D)
                tl.store(held + victim, leaving.to(tl.float16))
            tl.debug_barrier()  # the row has been copied before it is overwritten
            tl.store(held + slot, score.to(tl.float16))
    first = slot == 0  # token 0, where the head has sinks
    _put(new_key, k_exact, k_codes, k_scales, k_anchors, k_codec, at, first & (k_anchor >= 0), K_CODECS, D, DP)
    _put(new_value, v_exact, v_codes, v_scales, v_anchors, v_codec, at, first & (v_anchor >= 0), V_CODECS, D, DP)


@triton.jit(do_not_specialize=[*SIZES, *UNITS, "scored_stride"])
def _append(
    heads, seen_by, places, new_keys, new_values, score, scores,
    k_exact, k_codes, k_scales, k_anchors, v_exact, v_codes, v_scales, v_anchors,
    k_rows, k_codes_step, k_scales_step, k_anchored, v_rows, v_codes_step, v_scales_step, v_anchored, scored_stride,
    k_codes_unit, k_scales_unit, v_codes_unit, v_scales_unit,
    D: tl.constexpr, DP: tl.constexpr, K_CODECS: tl.constexpr, V_CODECS: tl.constexpr, SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (head, sequence). `SCORES`: the layer has heads that keep them."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    if tl.load(heads + h * ROW + KIND) == OTHER:
        return
    which = b * tl.num_programs(0) + h
    store_token(
        b, h, heads, seen_by, places, new_keys + which * D, new_values + which * D,
        tl.load(score + which).to(tl.float32), scores,
        k_exact, k_codes, k_scales, k_anchors, v_exact, v_codes, v_scales, v_anchors,
        k_rows, k_codes_step, k_scales_step, k_anchored, v_rows, v_codes_step, v_scales_step, v_anchored, scored_stride,
        k_codes_unit, k_scales_unit, v_codes_unit, v_scales_unit, D, DP, K_CODECS, V_CODECS, SCORES, BLOCK,
    )  # fmt: skip


def append(
    keys: Buffers,
    values: Buffers,
    scores: torch.Tensor,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    score: torch.Tensor | None,
    seen: Sequence[int] | torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """See `api.append`. `seen` is best an int32 tensor on the device: a list has to be copied there."""
    batch, heads, head_dim = new_keys.shape
    device = new_keys.device
    if not isinstance(seen, torch.Tensor):
        seen = torch.tensor(seen, dtype=torch.int32, device=device)
    places = in_order(layout, batch, device) if places is None else places
    with on_device(device):
        launch(
            _append, (heads, batch),
            head_table(layout, head_dim, device), seen, places, new_keys.contiguous(), new_values.contiguous(),
            new_keys if score is None else score.contiguous(), scores, *tensors(keys), *tensors(values), *steps(keys),
            *steps(values), scores.stride(0), *unit_sizes(layout.side_codecs, head_dim).values(),
            **constants(head_dim, layout.side_codecs),
            SCORES=layout.scored_slots > 0, num_warps=WARPS,
        )  # fmt: skip


def constants(head_dim: int, codecs: tuple[Iterable[int], ...]) -> dict[str, int]:
    """Sizes that the kernel is compiled with, for keys and values in these codecs."""
    found = {"D": head_dim, "DP": triton.next_power_of_2(head_dim), "BLOCK": BLOCK}
    return found | codec_sets(codecs, head_dim)
