"""The launch: a program reads one range of one head's slots, an item of the work list, and the last one joins them.

The queries of a group, and of new tokens, are rows, R of which a program takes, so every group size costs the same. The
softmax is computed on the way: l is the sum of the exponentials of logits less m, acc the sum of values weighted with
them. `join` has the sum over a head's items.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.arguments import COLUMNS, SIZES
from kvcompile.kernels.overlap import let_next_begin, wait_for_previous
from kvcompile.kernels.ragged_decode.pairs import key_codec, pair_count, value_codec
from kvcompile.kernels.ragged_decode.triton.early import affordable, begin
from kvcompile.kernels.ragged_decode.triton.join import finish, merge
from kvcompile.kernels.ragged_decode.triton.parts import asked, first, keep, key_logits, mixed
from kvcompile.kernels.tiles import columns, of_head

OWN = ("head", "part", "count")
"""Columns of an item before those of its head: its number among the head's items, and their number."""
ITEM = tl.constexpr(1 << (len(OWN) + len(COLUMNS) - 1).bit_length())
"""Columns of an item in all, of which the last are not used: 128 bytes, which come in one access to memory."""
HEAD, PART, COUNT = (tl.constexpr(i) for i in range(len(OWN)))
CAPACITY, SINK = (tl.constexpr(len(OWN) + COLUMNS.index(name)) for name in ("capacity", "sink"))
K_CODEC, K_ROW, K_ANCHOR, K_CODES, K_SCALES, V_CODEC, V_ROW, V_ANCHOR, V_CODES, V_SCALES = (
    tl.constexpr(len(OWN) + COLUMNS.index(f"{side}_{name}"))
    for side in "kv"
    for name in ("codec", "row", "anchor", "codes", "scales")
)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scan(
    rows, query, partial, stats, k_exact, k_codes, k_scales, k_first, v_exact, v_codes, v_scales, v_first,
    start, stop, capacity, anchored, seen, newest, scale, used, length,
    KC: tl.constexpr, VC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KS: tl.constexpr, VS: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr, CODE: tl.constexpr, LAG: tl.constexpr,
):  # fmt: skip
    """One item, the slots [start, stop) of a head; all pointers are those of the head in this sequence. KC and VC are
    the codecs of its keys and values."""
    KT: tl.constexpr = EXACT if KC == 0 else CODE
    VT: tl.constexpr = EXACT if VC == 0 else CODE
    m = tl.full([R], float("-inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    # Where one side is quantised and slot 0 is a sink, that slot is taken from its exact copy, before all others.
    taken = (start == 0) & anchored & (KC + VC > 0)
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
    # Values are one block behind keys where they `LAG`, so that the products of both wait for nothing of each other.
    BEHIND: tl.constexpr = HALVES * N if LAG else 0
    logits = ()
    for _ in tl.static_range(HALVES):
        logits = logits + (tl.full([N, R], float("-inf"), tl.float32),)
    for i in tl.range(start, stop + BEHIND, HALVES * N, num_stages=STAGES):
        found = ()
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
            found = found + (tl.where(visible, one, float("-inf")),)
        if not LAG:
            logits = found
        slots = ()
        valid = ()
        for half in tl.static_range(HALVES):
            slot = i - BEHIND + half * N + tl.arange(0, N)
            slots = slots + (slot,)
            valid = valid + ((slot >= start) & (slot < stop) if LAG else slot < stop,)
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
        if LAG:
            logits = found
    # Where the results go is worked out here, and not before the loop: registers are scarce there.
    index = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    keep(acc, partial + index * used * D, rows, used, VC, D, DP, VT)
    stats += index * 2 * used
    tl.store(stats + rows, m, mask=rows < used)
    tl.store(stats + used + rows, l, mask=rows < used)


@triton.jit
def span(part, most, filled, BLOCK: tl.constexpr):
    """What is stored now, cut into at most `most` equal items, none of which is empty (of a short text, the last ones
    are not used): their number, and the slots [start, stop) of item `part`."""
    blocks = (filled + BLOCK - 1) // BLOCK
    count = tl.maximum(tl.minimum(most, blocks), 1)
    start = blocks * part // count * BLOCK
    stop = tl.minimum(blocks * (part + 1) // count * BLOCK, filled)
    return tl.minimum(count, blocks), start, stop


@triton.jit(do_not_specialize=[*SIZES, "fan", "early"])
def _decode(
    query, partial, stats, items, seen_by, places, done, out, new_keys, new_values, new_mask,
    k_exact, k_codes, k_scales, k_anchors, v_exact, v_codes, v_scales, v_anchors,
    k_rows, k_codes_step, k_scales_step, k_anchored, v_rows, v_codes_step, v_scales_step, v_anchored,
    scale, num_heads, used, length, before, fan, early,
    PAIRS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KU: tl.constexpr, KS: tl.constexpr, VU: tl.constexpr,
    VS: tl.constexpr, R: tl.constexpr, TB: tl.constexpr, N: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr, CODE: tl.constexpr, GROUPS: tl.constexpr, NEW: tl.constexpr,
    MASKED: tl.constexpr, LAG: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (item, sequence, R rows). `used` rows are queries of a head, row r that of new token r % `length`;
    `before` is 1 where the query's own token has been stored, else 0. `places` says where in the store a sequence is.
    A program fetches `early` bytes before it waits for the launch before it (0: none, where that one may write
    `places`). `PAIRS` are the pairs of codecs in the layer (see `pairs`); `fan` items of a head are joined at a
    time, in at most `GROUPS` groups."""
    let_next_begin(OVERLAP)
    b = tl.program_id(1).to(tl.int64)
    row = items + tl.program_id(0) * ITEM
    h = tl.load(row + HEAD)
    part = tl.load(row + PART)
    most = tl.load(row + COUNT)
    capacity = tl.load(row + CAPACITY)
    anchored = tl.load(row + SINK) > 0
    k_codec = tl.load(row + K_CODEC)
    v_codec = tl.load(row + V_CODEC)
    if OVERLAP:
        if early > 0:
            # By the `seen` of now, which the launch before may change: good enough for what is only a hint.
            _, start, stop = span(part, most, tl.minimum(capacity, tl.load(seen_by + b, volatile=True)), N * HALVES)
            place = tl.load(places + b, volatile=True).to(tl.int64)
            keys, key_codes, key_scales, _ = of_head(
                place, k_exact, k_codes, k_scales, k_anchors, k_rows, k_codes_step, k_scales_step, k_anchored,
                tl.load(row + K_ROW), tl.load(row + K_CODES), tl.load(row + K_SCALES), 0, D, KU, KS,
            )  # fmt: skip
            values, value_codes, value_scales, _ = of_head(
                place, v_exact, v_codes, v_scales, v_anchors, v_rows, v_codes_step, v_scales_step, v_anchored,
                tl.load(row + V_ROW), tl.load(row + V_CODES), tl.load(row + V_SCALES), 0, D, VU, VS,
            )  # fmt: skip
            for i in tl.static_range(pair_count(PAIRS)):
                if (k_codec == key_codec(PAIRS, i)) & (v_codec == value_codec(PAIRS, i)):
                    slots = affordable(early, k_exact, key_codec(PAIRS, i), value_codec(PAIRS, i), D)
                    slots = tl.minimum(stop - start, slots)
                    begin(keys, key_codes, key_scales, start, slots, key_codec(PAIRS, i), D)
                    begin(values, value_codes, value_scales, start, slots, value_codec(PAIRS, i), D)
    wait_for_previous(OVERLAP)  # tables never change
    # Both are on their way at a time.
    seen = tl.load(seen_by + b, volatile=True)
    place = tl.load(places + b, volatile=True).to(tl.int64)
    count, start, stop = span(part, most, tl.minimum(capacity, seen), N * HALVES)
    if part < count:
        k_exact, k_codes, k_scales, k_anchors = of_head(
            place, k_exact, k_codes, k_scales, k_anchors, k_rows, k_codes_step, k_scales_step, k_anchored,
            tl.load(row + K_ROW), tl.load(row + K_CODES), tl.load(row + K_SCALES), tl.load(row + K_ANCHOR), D, KU, KS,
        )  # fmt: skip
        v_exact, v_codes, v_scales, v_anchors = of_head(
            place, v_exact, v_codes, v_scales, v_anchors, v_rows, v_codes_step, v_scales_step, v_anchored,
            tl.load(row + V_ROW), tl.load(row + V_CODES), tl.load(row + V_SCALES), tl.load(row + V_ANCHOR), D, VU, VS,
        )  # fmt: skip
        for i in tl.static_range(pair_count(PAIRS)):
            if (k_codec == key_codec(PAIRS, i)) & (v_codec == value_codec(PAIRS, i)):
                _scan(
                    tl.program_id(2) * R + tl.arange(0, R), query + (b * num_heads + h) * used * D, partial, stats,
                    k_exact, k_codes, k_scales, k_exact if key_codec(PAIRS, i) == 0 else k_anchors,
                    v_exact, v_codes, v_scales, v_exact if value_codec(PAIRS, i) == 0 else v_anchors,
                    start, stop, capacity, anchored, seen, seen - before, scale * LOG2E, used, length,
                    key_codec(PAIRS, i), value_codec(PAIRS, i), D, DP, KS, VS, R, N, HALVES, STAGES, WINDOW, EXACT,
                    CODE, LAG,
                )  # fmt: skip
    # The last program of `fan` neighbours joins what they have found, and the last of a head to do so joins that. The
    # barriers are for the stores of the program's own threads, the atomics' order for those of other programs.
    tl.debug_barrier()
    which = b * num_heads + h
    group = part // fan
    ticket = done + (which * tl.num_programs(2) + tl.program_id(2)) * (1 + GROUPS)
    if tl.atomic_add(ticket + 1 + group, 1, sem="acq_rel") == tl.minimum(most - group * fan, fan) - 1:
        tl.store(ticket + 1 + group, 0)  # ready for the next launch
        rows = tl.program_id(2) * R + tl.arange(0, R)
        first_item = b * tl.num_programs(0) + tl.program_id(0) - part
        partial += first_item * used * D
        stats += first_item * 2 * used
        own = group * fan
        m, l, acc = merge(
            rows, partial + own * used * D, stats + own * 2 * used, tl.minimum(count - own, fan), 1, used, D, DP, R
        )  # fmt: skip
        groups = (most + fan - 1) // fan
        last = groups == 1
        if groups > 1:
            d = tl.arange(0, DP)
            mine = rows < used
            tl.debug_barrier()  # all have read what is overwritten here
            tl.store(partial + (own * used + rows)[None, :] * D + d[:, None], acc,
                     mask=(d < D)[:, None] & mine[None, :])  # fmt: skip
            tl.store(stats + own * 2 * used + rows, m, mask=mine)
            tl.store(stats + own * 2 * used + used + rows, l, mask=mine)
            tl.debug_barrier()
            if tl.atomic_add(ticket, 1, sem="acq_rel") == groups - 1:
                tl.store(ticket, 0)
                last = True
                m, l, acc = merge(rows, partial, stats, (count + fan - 1) // fan, fan, used, D, DP, R)
        if last:
            finish(
                rows, m, l, acc, query + which * used * D, new_keys + which * length * D,
                new_values + which * length * D, new_mask + b * length * length, out + which * used * D,
                scale * LOG2E, used, length, D, DP, R, TB, WINDOW, NEW, MASKED,
            )  # fmt: skip
