"""The launch: a program reads an item of the work list, and the last one to be done with a head joins them."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.arguments import COLUMNS, SIZES
from kvcompile.kernels.overlap import let_next_begin, wait_for_previous
from kvcompile.kernels.ragged_decode.pairs import key_codec, pair_count, value_codec
from kvcompile.kernels.ragged_decode.triton.early import affordable, begin
from kvcompile.kernels.ragged_decode.triton.join import finish, merge
from kvcompile.kernels.ragged_decode.triton.scan import scan
from kvcompile.kernels.tiles import of_head

OWN = ("head", "part", "first", "last", "count", "blocks", "at")
"""Columns of an item before those of its head: see `work.Item`; its head's items and blocks, and which of the layer's
items it is."""
ITEM = tl.constexpr(1 << (len(OWN) + len(COLUMNS) - 1).bit_length())
"""Columns of an item in all, of which the last are not used: 128 bytes, which come in one access to memory."""
HEAD, PART, FIRST, LAST, COUNT, BLOCKS, AT = (tl.constexpr(i) for i in range(len(OWN)))
CAPACITY, SINK = (tl.constexpr(len(OWN) + COLUMNS.index(name)) for name in ("capacity", "sink"))
K_CODEC, K_ROW, K_ANCHOR, K_CODES, K_SCALES, V_CODEC, V_ROW, V_ANCHOR, V_CODES, V_SCALES = (
    tl.constexpr(len(OWN) + COLUMNS.index(f"{side}_{name}"))
    for side in "kv"
    for name in ("codec", "row", "anchor", "codes", "scales")
)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def span(row, filled, BLOCK: tl.constexpr):
    """How many items of its head have slots now, and which the item in this row has: [start, stop). See `work.span`."""
    part, count = tl.load(row + PART), tl.load(row + COUNT)
    first, last, blocks = tl.load(row + FIRST), tl.load(row + LAST), tl.load(row + BLOCKS)
    now = (filled + BLOCK - 1) // BLOCK
    short = now < count
    start = tl.where(short, part, now * first // blocks)
    stop = tl.where(short, part + 1, now * last // blocks)
    return tl.minimum(count, now), start * BLOCK, tl.minimum(stop * BLOCK, filled)


@triton.jit(do_not_specialize=[*SIZES, "fan", "early"])
def _decode(
    query, partial, stats, items, seen_by, places, done, out, new_keys, new_values, new_mask,
    k_exact, k_codes, k_scales, k_anchors, v_exact, v_codes, v_scales, v_anchors,
    k_rows, k_codes_step, k_scales_step, k_anchored, v_rows, v_codes_step, v_scales_step, v_anchored,
    scale, num_heads, used, length, before, fan, early,
    PAIRS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KU: tl.constexpr, KS: tl.constexpr, VU: tl.constexpr,
    VS: tl.constexpr, R: tl.constexpr, TB: tl.constexpr, N: tl.constexpr, HALVES: tl.constexpr, STAGES: tl.constexpr,
    WINDOW: tl.constexpr, EXACT: tl.constexpr, CODE: tl.constexpr, GROUPS: tl.constexpr, NEW: tl.constexpr,
    MASKED: tl.constexpr, TOGETHER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (sequence, item, R rows). `used` rows are queries of a head, row r that of new token r % `length`;
    `before` is 1 where the query's own token has been stored, else 0. `places` says where in the store a sequence is.
    A program fetches `early` bytes before it waits for the launch before it (0: none, where that one may write
    `places`). `PAIRS` are the pairs of codecs in the layer (see `pairs`); `fan` items of a head are joined at a
    time, in at most `GROUPS` groups."""
    let_next_begin(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    BLOCK: tl.constexpr = N * HALVES
    row = items + tl.program_id(1) * ITEM
    h = tl.load(row + HEAD)
    part = tl.load(row + PART)
    capacity = tl.load(row + CAPACITY)
    anchored = tl.load(row + SINK) > 0
    k_codec = tl.load(row + K_CODEC)
    v_codec = tl.load(row + V_CODEC)
    if OVERLAP:
        if early > 0:
            # By the `seen` of now, which the launch before may change: good enough for what is only a hint.
            _, start, stop = span(row, tl.minimum(capacity, tl.load(seen_by + b, volatile=True)), BLOCK)
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
    count, start, stop = span(row, tl.minimum(capacity, seen), BLOCK)
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
                scan(
                    tl.program_id(2) * R + tl.arange(0, R), query + (b * num_heads + h) * used * D, partial, stats,
                    b * tl.num_programs(1) + tl.load(row + AT),
                    k_exact, k_codes, k_scales, k_exact if key_codec(PAIRS, i) == 0 else k_anchors,
                    v_exact, v_codes, v_scales, v_exact if value_codec(PAIRS, i) == 0 else v_anchors,
                    start, stop, capacity, anchored, seen, seen - before, scale * LOG2E, used, length,
                    key_codec(PAIRS, i), value_codec(PAIRS, i), D, DP, KS, VS, R, N, HALVES, STAGES, WINDOW, EXACT,
                    CODE,
                )  # fmt: skip
    # The last program of `fan` neighbours joins what they have found, and the last of a head to do so joins that. The
    # barriers are for the stores of the program's own threads, the atomics' order for those of other programs.
    tl.debug_barrier()
    # Read again: these would cost registers in the loop.
    h, part, most = tl.load(row + HEAD), tl.load(row + PART), tl.load(row + COUNT)
    group = part // fan
    which = b * num_heads + h
    ticket = done + (which * tl.num_programs(2) + tl.program_id(2)) * (1 + GROUPS)
    if tl.atomic_add(ticket + 1 + group, 1, sem="acq_rel") == tl.minimum(most - group * fan, fan) - 1:
        rows = tl.program_id(2) * R + tl.arange(0, R)
        tl.store(ticket + 1 + group, 0)  # ready for the next launch
        first_item = b * tl.num_programs(1) + tl.load(row + AT) - part
        partial += first_item * used * D
        stats += first_item * 2 * used
        own = group * fan
        m, l, acc = merge(
            rows, partial + own * used * D, stats + own * 2 * used, tl.minimum(count - own, fan), 1, used, D, DP, R,
            TOGETHER,
        )  # fmt: skip
        groups = (most + fan - 1) // fan
        last = groups == 1
        if groups > 1:
            d = tl.arange(0, DP)
            mine = rows < used
            tl.debug_barrier()  # all have read what is overwritten here
            mean = acc * tl.where(l > 0.0, 1.0 / l, 0.0)[None, :]
            tl.store(partial + (own * used + rows)[None, :] * D + d[:, None], mean,
                     mask=(d < D)[:, None] & mine[None, :])  # fmt: skip
            tl.store(stats + own * 2 * used + rows, m, mask=mine)
            tl.store(stats + own * 2 * used + used + rows, l, mask=mine)
            tl.debug_barrier()
            if tl.atomic_add(ticket, 1, sem="acq_rel") == groups - 1:
                tl.store(ticket, 0)
                last = True
                m, l, acc = merge(rows, partial, stats, (count + fan - 1) // fan, fan, used, D, DP, R, TOGETHER)
        if last:
            finish(
                rows, m, l, acc, query + which * used * D, new_keys + which * length * D,
                new_values + which * length * D, new_mask + b * length * length, out + which * used * D,
                scale * LOG2E, used, length, D, DP, R, TB, WINDOW, NEW, MASKED,
            )  # fmt: skip
