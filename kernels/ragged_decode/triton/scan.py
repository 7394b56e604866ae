"""One range of one head's slots, an item of the work list.

The queries of a group, and of new tokens, are rows, R of which a program takes, so every group size costs the same. The
softmax is computed on the way: l is the sum of the exponentials of logits less m, acc the sum of values weighted with
them. `join` has the sum over a head's items.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.ragged_decode.triton.parts import asked, first, keep, key_logits, mixed
from kvcompile.kernels.tiles import columns


@triton.jit
def scan(
    rows, query, partial, stats, index, k_exact, k_codes, k_scales, k_first, v_exact, v_codes, v_scales, v_first,
    start, stop, capacity, anchored, seen, newest, scale, used, length,
    KC: tl.constexpr, VC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """The slots [start, stop) of a head, of which there may be none; pointers to its query and stores are those of the
    head in this sequence, and results go to item `index` of `partial` and `stats`. KC and VC are the codecs of its keys
    and values."""
    KT: tl.constexpr = EXACT if KC == 0 else CODE
    VT: tl.constexpr = EXACT if VC == 0 else CODE
    m = tl.full([R], float("-inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    # Where one side is quantised and slot 0 is a sink, that slot is taken from its exact copy, before all others.
    taken = (start == 0) & (stop > 0) & anchored & (KC + VC > 0)
    acc = first(v_first, False, VC, D, DP, R)
    if KC + VC > 0:
        if taken:
            d = tl.arange(0, DP)
            key = tl.load(k_first + d, mask=d < D, other=0.0).to(tl.float32)
            m = tl.sum(columns(query, rows, used, 1, D, DP, D) * key[:, None], 0) * scale
            l = tl.full([R], 1.0, tl.float32)
            acc = first(v_first, True, VC, D, DP, R)
    most = m
    parts, sums = asked(query, rows, used, KC, D, DP, KT)
    for i in tl.range(start, stop, HALVES * N, num_stages=STAGES):
        logits = ()
        slots = ()
        valid = ()
        for half in tl.static_range(HALVES):
            slot = i + half * N + tl.arange(0, N)
            inside = slot < stop
            one = key_logits(parts, sums, k_exact, k_codes, k_scales, slot, inside, scale, KC, D, DP, KS, KT)
            visible = (inside & ((slot > 0) | (taken == 0)))[:, None]
            if WINDOW > 0:
                # A sliding layer is one ring without sinks: a slot holds the last token that is its number modulo the
                # ring.
                token = seen - 1 - (seen - 1 - slot) % capacity
                visible = visible & (token[:, None] > (newest + rows % length)[None, :] - WINDOW)
            logits = logits + (tl.where(visible, one, float("-inf")),)
            slots = slots + (slot,)
            valid = valid + (inside,)
        top = tl.max(logits[0] if HALVES == 1 else tl.maximum(logits[0], logits[1]), 0)
        most = tl.maximum(most, top)
        # Weights are relative to the highest logit of this block, and not of all so far: beside a sink with nearly all
        # of the weight, many thousands of others would vanish in half precision, which can carry a visible share. Where
        # they are 2^-16 of it and less, they may.
        above = most if CODE == tl.float32 else tl.maximum(top, most - 16.0)
        finite = tl.where(above == float("-inf"), 0.0, above)
        weights = ()
        for half in tl.static_range(HALVES):
            weights = weights + (tl.exp2(logits[half] - finite[None, :]),)
        alpha = tl.exp2(m - finite)
        l = l * alpha + tl.sum(weights[0] if HALVES == 1 else weights[0] + weights[1], 0)
        acc = mixed(acc, alpha, weights, v_exact, v_codes, v_scales, slots, valid, VC, D, DP, VS, VT, N)
        m = above
    inverse = tl.where(l > 0.0, 1.0 / l, 0.0)
    keep(acc, inverse, partial + index * used * D, rows, used, VC, D, DP, VT)
    stats += index * 2 * used
    tl.store(stats + rows, m, mask=rows < used)
    tl.store(stats + used + rows, l, mask=rows < used)
