"""Ragged decoding on a GPU: split-K over a work list, then one small reduction.

A program reads one range of one head's slots. The queries of a group, and of a few new tokens, are the rows of one
tile, so every group size costs the same. Codes stay integers in the products; scales and centres are applied to logits
and weights, so that a code costs little more than its load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvcompile.kernels.buffers import Stored
from kvcompile.kernels.layout import HeadRow, LayerLayout
from kvcompile.kernels.ragged_decode.tuning import Tuning, entry, items_of
from kvcompile.kernels.ragged_decode.work import work_list

ROW = tl.constexpr(len(HeadRow._fields))
CAPACITY, SINK, K_WIDTH, K_ROW, K_ANCHOR, V_WIDTH, V_ROW, V_ANCHOR = (
    tl.constexpr(HeadRow._fields.index(name))
    for name in ("capacity", "sink", "k_width", "k_row", "k_anchor", "v_width", "v_row", "v_anchor")
)
WIDTHS = (0, 8, 4)
"""In the order of `PAIRS`."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _integers(codes, DTYPE: tl.constexpr):
    """Codes as floats; in half precision by setting the bits of 1024 + code, which is cheaper than any conversion."""
    if DTYPE == tl.float16:
        return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    return codes.to(DTYPE)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _elements(base, rows, used, STEP: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr):
    """Every `STEP`-th of the elements at `base`, `COUNT` of them, of rows of D elements: f32 [rows, PADDED]."""
    d = tl.arange(0, PADDED)
    mask = (rows < used)[:, None] & (d < COUNT)[None, :]
    return tl.load(base + rows[:, None] * D + d[None, :] * STEP, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _bytes(codes, slot, there, group, COUNT: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr):
    """Bytes [slots, PADDED] of one group of `COUNT` bytes of the slots."""
    d = tl.arange(0, PADDED)
    mask = there[:, None] & (d < COUNT)[None, :]
    return tl.load(codes + slot[:, None] * STRIDE + group * COUNT + d[None, :], mask=mask, other=0)


@triton.jit
def _asked(query, rows, used, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
           DTYPE: tl.constexpr):  # fmt: skip
    """The query as the key's parts need it: whole, by group, or by group and parity; and its sums by group."""
    SIZE: tl.constexpr = D // G
    parts = ()
    sums = ()
    if WIDTH == 0:
        parts = (_elements(query, rows, used, 1, D, DP, D).to(DTYPE),)
    else:
        for g in tl.static_range(G):
            if WIDTH == 8:
                part = _elements(query + g * SIZE, rows, used, 1, SIZE, P, D).to(DTYPE)
                parts = parts + (part,)
                sums = sums + (127.5 * tl.sum(part.to(tl.float32), 1),)
            else:
                even = _elements(query + g * SIZE, rows, used, 2, SIZE // 2, P, D).to(DTYPE)
                odd = _elements(query + g * SIZE + 1, rows, used, 2, SIZE // 2, P, D).to(DTYPE)
                parts = parts + (even, odd)
                sums = sums + (7.5 * (tl.sum(even.to(tl.float32), 1) + tl.sum(odd.to(tl.float32), 1)),)
    return parts, sums


@triton.jit
def _logits(parts, sums, exact, codes, scales, slot, there, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Products f32 [rows, slots] of the query with the keys of the slots."""
    SIZE: tl.constexpr = D // G
    if WIDTH == 0:
        d = tl.arange(0, DP)
        mask = there[:, None] & (d < D)[None, :]
        k = tl.load(exact + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
        total = _product(parts[0], tl.trans(k))
    else:
        for g in tl.static_range(G):
            scale = tl.load(scales + slot * G + g, mask=there, other=0.0).to(tl.float32)
            if WIDTH == 8:
                c = _bytes(codes, slot, there, g, SIZE, P, D)
                one = _product(parts[g], tl.trans(_integers(c, DTYPE)))
            else:
                c = _bytes(codes, slot, there, g, SIZE // 2, P, D // 2)
                one = _product(parts[2 * g], tl.trans(_integers(c & 15, DTYPE)))
                one += _product(parts[2 * g + 1], tl.trans(_integers(c >> 4, DTYPE)))
            one = (one - sums[g][:, None]) * scale[None, :]
            if g == 0:
                total = one
            else:
                total += one
    return total


@triton.jit
def _mixed(acc, alpha, weights, exact, codes, scales, slot, there, WIDTH: tl.constexpr, D: tl.constexpr,
           DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """`acc` times `alpha` plus the weighted values of the slots, part by part."""
    SIZE: tl.constexpr = D // G
    new = ()
    if WIDTH == 0:
        d = tl.arange(0, DP)
        mask = there[:, None] & (d < D)[None, :]
        v = tl.load(exact + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
        new = (acc[0] * alpha[:, None] + _product(weights.to(DTYPE), v),)
    else:
        for g in tl.static_range(G):
            scale = tl.load(scales + slot * G + g, mask=there, other=0.0).to(tl.float32)
            scaled = (weights * scale[None, :]).to(DTYPE)
            total = tl.sum(scaled.to(tl.float32), 1)[:, None]
            if WIDTH == 8:
                c = _bytes(codes, slot, there, g, SIZE, P, D)
                one = acc[g] * alpha[:, None] + (_product(scaled, _integers(c, DTYPE)) - 127.5 * total)
                new = new + (one,)
            else:
                c = _bytes(codes, slot, there, g, SIZE // 2, P, D // 2)
                even = _product(scaled, _integers(c & 15, DTYPE)) - 7.5 * total
                odd = _product(scaled, _integers(c >> 4, DTYPE)) - 7.5 * total
                even += acc[2 * g] * alpha[:, None]
                odd += acc[2 * g + 1] * alpha[:, None]
                new = new + (even, odd)
    return new


@triton.jit
def _first(value, has, rows, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr,
           P: tl.constexpr):  # fmt: skip
    """The accumulators, part by part: the value of slot 0 where it `has` been taken already, else 0."""
    SIZE: tl.constexpr = D // G
    used = has.to(tl.int32)
    one = rows * 0  # every row is row 0
    new = ()
    if WIDTH == 0:
        new = (_elements(value, one, used, 1, D, DP, D),)
    else:
        for g in tl.static_range(G):
            if WIDTH == 8:
                new = new + (_elements(value + g * SIZE, one, used, 1, SIZE, P, D),)
            else:
                even = _elements(value + g * SIZE, one, used, 2, SIZE // 2, P, D)
                odd = _elements(value + g * SIZE + 1, one, used, 2, SIZE // 2, P, D)
                new = new + (even, odd)
    return new


@triton.jit
def _keep(acc, out, rows, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """Store the accumulators as rows of D elements."""
    SIZE: tl.constexpr = D // G
    if WIDTH == 0:
        d = tl.arange(0, DP)
        tl.store(out + rows[:, None] * D + d[None, :], acc[0], mask=(d < D)[None, :])
    else:
        d = tl.arange(0, P)
        for g in tl.static_range(G):
            if WIDTH == 8:
                tl.store(out + rows[:, None] * D + g * SIZE + d[None, :], acc[g], mask=(d < SIZE)[None, :])
            else:
                at = out + rows[:, None] * D + g * SIZE + 2 * d[None, :]
                tl.store(at, acc[2 * g], mask=(d < SIZE // 2)[None, :])
                tl.store(at + 1, acc[2 * g + 1], mask=(d < SIZE // 2)[None, :])


@triton.jit
def _scan(
    query, partial, stats, k_exact, k_codes, k_scales, k_first, v_exact, v_codes, v_scales, v_first,
    start, stop, capacity, anchored, seen, newest, scale, used,
    KW: tl.constexpr, VW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P8: tl.constexpr,
    P4: tl.constexpr, R: tl.constexpr, T: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, EXACT: tl.constexpr,
    CODE: tl.constexpr,
):  # fmt: skip
    """One item, the slots [start, stop) of a head; all pointers are those of the head in this sequence."""
    KP: tl.constexpr = P4 if KW == 4 else P8
    VP: tl.constexpr = P4 if VW == 4 else P8
    KT: tl.constexpr = EXACT if KW == 0 else CODE
    VT: tl.constexpr = EXACT if VW == 0 else CODE
    rows = tl.arange(0, R)
    parts, sums = _asked(query, rows, used, KW, D, DP, G, KP, KT)
    m = tl.full([R], float("-inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    # Where one side is rounded and slot 0 is a sink, that slot is taken from its exact copy, before all others.
    taken = (start == 0) & anchored & (KW + VW > 0)
    if KW + VW > 0:
        d = tl.arange(0, DP)
        key = tl.load(k_first + d, mask=(d < D) & taken, other=0.0).to(tl.float32)
        logit = tl.sum(_elements(query, rows, used, 1, D, DP, D) * key[None, :], 1) * scale
        m = tl.where(taken, logit, m)
        l = tl.where(taken, 1.0, l)
    acc = _first(v_first, taken, rows, VW, D, DP, G, VP)
    for i in tl.range(start, stop, N):
        slot = i + tl.arange(0, N)
        there = slot < stop
        logits = _logits(parts, sums, k_exact, k_codes, k_scales, slot, there, KW, D, DP, G, KP, KT) * scale
        visible = (there & ((slot > 0) | (taken == 0)))[None, :]
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
        acc = _mixed(acc, alpha, weights, v_exact, v_codes, v_scales, slot, there, VW, D, DP, G, VP, VT)
        m = highest
    _keep(acc, partial, rows, VW, D, DP, G, VP)
    tl.store(stats + rows, m)
    tl.store(stats + R + rows, l)


@triton.constexpr_function
def _width(index):
    """Bits by the order in `PAIRS`."""
    return (0, 8, 4)[index]


@triton.jit
def _side(b, row, anchor, exact, codes8, scales8, codes4, scales4, rows0, rows8, rows4, WIDTH: tl.constexpr,
          D: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """Where a head's vectors, codes, scales and the exact copy of slot 0 begin in this sequence."""
    if WIDTH == 0:
        exact += (b * rows0 + row) * D
        return exact, codes8, scales8, exact
    elif WIDTH == 8:
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
    stored, else 0. `PAIRS` are the pairs of widths in the layer, 3 * K + V, as the bits of a number."""
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
    k_width = tl.load(row + K_WIDTH)
    v_width = tl.load(row + V_WIDTH)
    k_row = tl.load(row + K_ROW).to(tl.int64)
    v_row = tl.load(row + V_ROW).to(tl.int64)
    k_anchor = k_anchors + (b * k_anchored + tl.load(row + K_ANCHOR)) * D
    v_anchor = v_anchors + (b * v_anchored + tl.load(row + V_ANCHOR)) * D
    query += (b * num_heads + h) * used * D
    partial += index * R * D
    for pair in tl.static_range(9):
        if (PAIRS >> pair) & 1:
            if (k_width == _width(pair // 3)) & (v_width == _width(pair % 3)):
                _scan(
                    query, partial, stats,
                    *_side(b, k_row, k_anchor, k_exact, k_codes8, k_scales8, k_codes4, k_scales4,
                           k_rows0, k_rows8, k_rows4, _width(pair // 3), D, G),
                    *_side(b, v_row, v_anchor, v_exact, v_codes8, v_scales8, v_codes4, v_scales4,
                           v_rows0, v_rows8, v_rows4, _width(pair % 3), D, G),
                    start, stop, capacity, anchored, seen, seen - before, scale * LOG2E, used,
                    _width(pair // 3), _width(pair % 3), D, DP, G, P8, P4, R, T, N, WINDOW, EXACT, CODE,
                )  # fmt: skip


@triton.jit
def _reduce(
    partial, stats, heads, query, new_keys, new_values, new_mask, out, num_items, scale, num_heads, used,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, T: tl.constexpr, TP: tl.constexpr, NEW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Program (head, sequence): join the items of a head and, where the new tokens are not stored yet, them."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    first = tl.load(heads + 2 * h)
    count = tl.load(heads + 2 * h + 1)
    rows = tl.arange(0, R)
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    m = tl.full([R], float("-inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, DP], tl.float32)
    for i in range(count):
        index = b * num_items + first + i
        own = tl.load(stats + index * 2 * R + rows)
        if tl.max(own, 0) > float("-inf"):
            weight = tl.load(stats + index * 2 * R + R + rows)
            part = tl.load(partial + index * R * D + rows[:, None] * D + d[None, :], mask=inside, other=0.0)
            highest = tl.maximum(m, own)
            finite = tl.where(highest == float("-inf"), 0.0, highest)
            alpha, beta = tl.exp2(m - finite), tl.exp2(own - finite)
            acc = acc * alpha[:, None] + part * beta[:, None]
            l = l * alpha + weight * beta
            m = highest
    offset = (b * num_heads + h) * used * D
    if NEW:
        t = tl.arange(0, TP)
        base = (b * num_heads + h) * T * D
        there = (t < T)[:, None] & inside
        q = _elements(query + offset, rows, used, 1, D, DP, D)
        k = tl.load(new_keys + base + t[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
        v = tl.load(new_values + base + t[:, None] * D + d[None, :], mask=there, other=0.0).to(tl.float32)
        logits = _product(q, tl.trans(k)) * (scale * LOG2E)
        asks = rows % T
        if MASKED:
            at = new_mask + b * T * T + asks[:, None] * T + t[None, :]
            visible = tl.load(at, mask=(t < T)[None, :] & (rows < used)[:, None], other=0) != 0
        else:
            visible = (t[None, :] <= asks[:, None]) & (t < T)[None, :]
        logits = tl.where(visible, logits, float("-inf"))
        highest = tl.maximum(m, tl.max(logits, 1))
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(logits - finite[:, None])
        alpha = tl.exp2(m - finite)
        l = l * alpha + tl.sum(weights, 1)
        acc = acc * alpha[:, None] + _product(weights, v)
    result = acc / l[:, None]
    tl.store(out + offset + rows[:, None] * D + d[None, :], result, mask=inside & (rows < used)[:, None])


class _Tables(NamedTuple):
    """What never changes about a layer, on the device."""

    items: torch.Tensor
    heads: torch.Tensor
    ranges: torch.Tensor
    pairs: int


def _tables(
    layout: LayerLayout, head_dim: int, exact_bits: int, programs: int, block: int, device: torch.device
) -> _Tables:
    key = ("ragged_decode", head_dim, exact_bits, programs, block, device)
    if key not in layout.memo:
        work = work_list(layout, head_dim, exact_bits, programs, block)
        pairs = {3 * WIDTHS.index(row.k_width) + WIDTHS.index(row.v_width) for row in layout.rows}
        tensors = (torch.tensor(t, dtype=torch.int32, device=device) for t in (work.items, layout.rows, work.heads))
        layout.memo[key] = _Tables(*tensors, sum(1 << pair for pair in pairs))
    tables: _Tables = layout.memo[key]
    return tables


TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def ragged_decode(
    query: torch.Tensor,
    keys: Stored,
    values: Stored,
    layout: LayerLayout,
    seen: Sequence[int] | torch.Tensor,
    scaling: float,
    new_keys: torch.Tensor | None,
    new_values: torch.Tensor | None,
    new_mask: torch.Tensor | None,
    chosen: Tuning | None = None,
) -> torch.Tensor:
    """See `api.ragged_decode`. `seen` is best an int32 tensor on the device: a list has to be copied there."""
    batch, num_heads, length, head_dim = query.shape
    device, heads = query.device, layout.num_kv_heads
    used = num_heads // heads * length
    exact = keys.exact.dtype
    chosen = chosen or entry(head_dim, exact)
    programs = items_of(chosen, device, batch)
    tables = _tables(layout, head_dim, exact.itemsize * 8, programs, chosen.block, device)
    items = len(tables.items)
    rows = max(16, triton.next_power_of_2(used))
    partial = torch.empty(batch, items, rows, head_dim, dtype=torch.float32, device=device)
    stats = torch.empty(batch, items, 2, rows, dtype=torch.float32, device=device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    query = query.contiguous()
    if not isinstance(seen, torch.Tensor):
        seen = torch.tensor(seen, dtype=torch.int32, device=device)
    groups = keys.scales[8].shape[2]
    sizes = {
        "D": head_dim, "DP": max(16, triton.next_power_of_2(head_dim)), "R": rows, "T": length,
    }  # fmt: skip
    buffers = [(s.exact, s.codes[8], s.scales[8], s.codes[4], s.scales[4], s.anchors) for s in (keys, values)]
    counts = [(s.exact.shape[1], s.codes[8].shape[1], s.codes[4].shape[1], s.anchors.shape[1]) for s in (keys, values)]
    _decode[(items, batch)](
        query, partial, stats, tables.items, tables.heads, seen, *buffers[0], *buffers[1], *counts[0], *counts[1],
        scaling, heads, used, int(new_keys is None),
        PAIRS=tables.pairs, G=groups, P8=max(16, triton.next_power_of_2(head_dim // groups)),
        P4=max(16, triton.next_power_of_2(head_dim // groups // 2)), N=chosen.block, WINDOW=layout.window,
        EXACT=TYPES[exact], CODE=tl.float32 if exact == torch.float32 else tl.float16,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages, **sizes,
    )  # fmt: skip
    is_new = new_keys is not None and new_values is not None
    new = (new_keys.contiguous(), new_values.contiguous()) if is_new else (query, query)
    mask = new_mask.expand(batch, 1, length, length).contiguous().view(torch.uint8) if new_mask is not None else query
    _reduce[(heads, batch)](
        partial, stats, tables.ranges, query, *new, mask, out, items, scaling, heads, used,
        TP=max(16, triton.next_power_of_2(length)), NEW=is_new, MASKED=new_mask is not None, num_warps=4, **sizes,
    )  # fmt: skip
    return out
