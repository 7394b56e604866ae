"""The second launch: the items of a head are joined, and with them new tokens that are not stored yet."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.tiles import elements, product

LOG2E = tl.constexpr(1.4426950408889634)


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
        valid = (t < T)[:, None] & inside
        q = elements(query + offset, rows, used, 1, D, DP, D)
        k = tl.load(new_keys + base + t[:, None] * D + d[None, :], mask=valid, other=0.0).to(tl.float32)
        v = tl.load(new_values + base + t[:, None] * D + d[None, :], mask=valid, other=0.0).to(tl.float32)
        logits = product(q, tl.trans(k)) * (scale * LOG2E)
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
        acc = acc * alpha[:, None] + product(weights, v)
    result = acc / l[:, None]
    tl.store(out + offset + rows[:, None] * D + d[None, :], result, mask=inside & (rows < used)[:, None])
