"""The items of a head joined, and with them new tokens that are not stored yet."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.tiles import columns, product


@triton.jit
def join(
    rows, partial, stats, count, query, new_keys, new_values, new_mask, out, scale, used, length,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, TB: tl.constexpr, MOST: tl.constexpr,
    WINDOW: tl.constexpr, NEW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`count` items of one head in one sequence (all pointers are theirs), for R of its rows: with m_i, l_i and acc_i
    of item i and m the highest m_i, the output is sum(acc_i 2^(m_i - m)) / sum(l_i 2^(m_i - m)). New tokens come in
    blocks of `TB`."""
    d = tl.arange(0, DP)
    mine = rows < used
    inside = (d < D)[:, None] & mine[None, :]
    i = tl.arange(0, MOST)
    at = stats + i[:, None] * 2 * used + rows[None, :]
    there = (i < count)[:, None] & mine[None, :]
    # .cg: other programs have written these, and the first-level cache is not kept coherent.
    highest = tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(at + used, mask=there, other=0.0, cache_modifier=".cg")
    m = tl.max(highest, 0)
    finite = tl.where(m == float("-inf"), 0.0, m)
    l = tl.sum(tl.exp2(highest - finite[None, :]) * sums, 0)
    acc = tl.zeros([DP, R], tl.float32)
    # The loads of an item depend on no other item, so that several are under way.
    for n in tl.range(count, loop_unroll_factor=2):
        own = tl.load(stats + n * 2 * used + rows, mask=mine, other=float("-inf"), cache_modifier=".cg")
        one = partial + (n * used + rows)[None, :] * D + d[:, None]
        acc += tl.load(one, mask=inside, other=0.0, cache_modifier=".cg") * tl.exp2(own - finite)[None, :]
    if NEW:
        dtype = query.dtype.element_ty
        q = columns(query, rows, used, 1, D, DP, D).to(dtype)
        asks = rows % length
        for first in range(0, length, TB):
            t = first + tl.arange(0, TB)
            valid = (t < length)[:, None] & (d < D)[None, :]
            k = tl.load(new_keys + t[:, None] * D + d[None, :], mask=valid, other=0.0).to(dtype)
            logits = product(k, q) * scale
            visible = (t < length)[:, None] & mine[None, :]
            if MASKED:
                visible = visible & (
                    tl.load(new_mask + asks[None, :] * length + t[:, None], mask=visible, other=0) != 0
                )
            else:
                visible = visible & (t[:, None] <= asks[None, :])
                if WINDOW > 0:
                    visible = visible & (t[:, None] > asks[None, :] - WINDOW)
            logits = tl.where(visible, logits, float("-inf"))
            both = tl.maximum(m, tl.max(logits, 0))
            finite = tl.where(both == float("-inf"), 0.0, both)
            weights = tl.exp2(logits - finite[None, :])
            alpha = tl.exp2(m - finite)
            l = l * alpha + tl.sum(weights, 0)
            place = new_values + t[None, :] * D + d[:, None]
            v = tl.load(place, mask=(t < length)[None, :] & (d < D)[:, None], other=0.0).to(dtype)
            acc = acc * alpha[None, :] + product(v, weights.to(dtype))
            m = both
    l = tl.where(mine, l, 1.0)
    tl.store(out + rows[None, :] * D + d[:, None], acc / l[None, :], mask=inside)
