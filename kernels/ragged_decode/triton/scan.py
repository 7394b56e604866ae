"""The first launch: a program reads one range of one head's slots, an item of the work list.

The queries of a group, and of a few new tokens, are the rows of one tile, so every group size costs the same. The
softmax is computed on the way: m is the highest logit so far, l the sum of exponentials, acc the sum of values weighted
with them. `reduce` joins these of a head's items.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.int4.triton import INT4
from kvcompile.kernels.codecs.int8.triton import INT8
from kvcompile.kernels.layout import EXACT as EXACT_ROWS
from kvcompile.kernels.layout import HeadRow
from kvcompile.kernels.ragged_decode.triton.parts import asked, first, keep, key_logits, mixed
from kvcompile.kernels.tiles import elements

ROW = tl.constexpr(len(HeadRow._fields))
CAPACITY, SINK, K_CODEC, K_ROW, K_ANCHOR, V_CODEC, V_ROW, V_ANCHOR = (
    tl.constexpr(HeadRow._fields.index(name))
    for name in ("capacity", "sink", "k_codec", "k_row", "k_anchor", "v_codec", "v_row", "v_anchor")
)
CODECS = (EXACT_ROWS, INT8.value, INT4.value)
"""In the order of `PAIRS`."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scan(
    query, partial, stats, k_exact, k_codes, k_scales, k_first, v_exact, v_codes, v_scales, v_first,
    start, stop, capacity, anchored, seen, newest, scale, used,
    KC: tl.constexpr, VC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P8: tl.constexpr,
    P4: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """One item, the slots [start, stop) of a head; all pointers are those of the head in this sequence. KC
    and VC are the codecs of its keys and values."""
    KP: tl.constexpr = P4 if KC == INT4 else P8
    VP: tl.constexpr = P4 if VC == INT4 else P8
    KT: tl.constexpr = EXACT if KC == 0 else CODE
    VT: tl.constexpr = EXACT if VC == 0 else CODE
    rows = tl.arange(0, R)
    parts, sums = asked(query, rows, used, KC, D, DP, G, KP, KT)
    m = tl.full([R], float("-inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    # Where one side is quantised and slot 0 is a sink, that slot is taken from its exact copy, before all others.
    taken = (start == 0) & anchored & (KC + VC > 0)
    if KC + VC > 0:
        d = tl.arange(0, DP)
        key = tl.load(k_first + d, mask=(d < D) & taken, other=0.0).to(tl.float32)
        logit = tl.sum(elements(query, rows, used, 1, D, DP, D) * key[None, :], 1) * scale
        m = tl.where(taken, logit, m)
        l = tl.where(taken, 1.0, l)
    acc = first(v_first, taken, rows, VC, D, DP, G, VP)
    for i in tl.range(start, stop, N):
        slot = i + tl.arange(0, N)
        valid = slot < stop
        logits = key_logits(parts, sums, k_exact, k_codes, k_scales, slot, valid, KC, D, DP, G, KP, KT) * scale
        visible = (valid & ((slot > 0) | (taken == 0)))[None, :]
        if WINDOW > 0:
            # A sliding layer is one ring without sinks: a slot holds the last token that is its number modulo the ring.
            token = seen - 1 - (seen - 1 - slot) % capacity
            visible = visible & (token[None, :] > (newest + rows % T)[:, None] - WINDOW)
        logits = tl.where(visible, logits, float("-inf"))
        highest = tl.maximum(m, tl.max(logits, 1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits - finite[:, None])
        alpha = tl.exp2(m - finite)
        l = l * alpha + tl.sum(weights, 1)
        acc = mixed(acc, alpha, weights, v_exact, v_codes, v_scales, slot, valid, VC, D, DP, G, VP, VT)
        m = highest
    keep(acc, partial, rows, VC, D, DP, G, VP)
    tl.store(stats + rows, m)
    tl.store(stats + R + rows, l)


@triton.constexpr_function
def _codec(index):
    """The codec of a place in the order of `PAIRS`."""
    return CODECS[index]


@triton.jit
def _side(b, row, anchor, exact, codes8, scales8, codes4, scales4, rows0, rows8, rows4, CODEC: tl.constexpr,
          D: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """Where a head's vectors, codes, scales and the exact copy of slot 0 begin in this sequence."""
    if CODEC == 0:
        exact += (b * rows0 + row) * D
        return exact, codes8, scales8, exact
    elif CODEC == INT8:
        first = b * rows8 + row
        return exact, codes8 + first * D, scales8 + first * G, anchor
    else:
        first = b * rows4 + row
        return exact, codes4 + first * (D // 2), scales4 + first * G, anchor


@triton.jit
def _decode(
    query, partial, stats, items, heads, seen_by,
    k_exact, k_codes8, k_scales8, k_codes4, k_scales4, k_anchors,
    v_exact, v_codes8, v_scales8, v_codes4, v_scales4, v_anchors,
    k_rows0, k_rows8, k_rows4, k_anchored, v_rows0, v_rows8, v_rows4, v_anchored,
    scale, num_heads, used, before,
    PAIRS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P8: tl.constexpr, P4: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Program (item, sequence). `used` of the R rows are queries; `before` is 1 where the query's own token has been
    stored, else 0. `PAIRS` are the pairs of codecs in the layer, 3 * K + V, as the bits of a number."""
    item = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    h = tl.load(items + 3 * item)
    start = tl.load(items + 3 * item + 1)
    seen = tl.load(seen_by + b)
    row = heads + h * ROW
    capacity = tl.load(row + CAPACITY)
    stop = tl.minimum(tl.load(items + 3 * item + 2), seen)
    index = b * tl.num_programs(0) + item
    stats += index * 2 * R
    if start >= stop:
        tl.store(stats + tl.arange(0, R), tl.full([R], float("-inf"), tl.float32))
        return
    anchored = tl.load(row + SINK) > 0
    k_codec = tl.load(row + K_CODEC)
    v_codec = tl.load(row + V_CODEC)
    k_row = tl.load(row + K_ROW).to(tl.int64)
    v_row = tl.load(row + V_ROW).to(tl.int64)
    k_anchor = k_anchors + (b * k_anchored + tl.load(row + K_ANCHOR)) * D
    v_anchor = v_anchors + (b * v_anchored + tl.load(row + V_ANCHOR)) * D
    query += (b * num_heads + h) * used * D
    partial += index * R * D
    for pair in tl.static_range(9):
        if (PAIRS >> pair) & 1:
            if (k_codec == _codec(pair // 3)) & (v_codec == _codec(pair % 3)):
                _scan(
                    query, partial, stats,
                    *_side(b, k_row, k_anchor, k_exact, k_codes8, k_scales8, k_codes4, k_scales4,
                           k_rows0, k_rows8, k_rows4, _codec(pair // 3), D, G),
                    *_side(b, v_row, v_anchor, v_exact, v_codes8, v_scales8, v_codes4, v_scales4,
                           v_rows0, v_rows8, v_rows4, _codec(pair % 3), D, G),
                    start, stop, capacity, anchored, seen, seen - before, scale * LOG2E, used,
                    _codec(pair // 3), _codec(pair % 3), D, DP, G, P8, P4, R, T, N, WINDOW, EXACT, CODE,
                )  # fmt: skip
