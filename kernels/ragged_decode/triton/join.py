"""The items of a head joined, and then new tokens that are not stored yet."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.tiles import columns, product


@triton.jit
def merge(rows, partial, stats, count, step, used, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
          TOGETHER: tl.constexpr):  # fmt: skip
    """`count` items, every `step`-th from the one at `partial` and `stats` on, for R rows: with m_i, l_i and mean o_i
    of item i, m the highest m_i, and the sums of l_i 2^(m_i - m) and of o_i l_i 2^(m_i - m) [DP, R]. `TOGETHER` are on
    their way at a time."""
    d = tl.arange(0, DP)
    mine = rows < used
    inside = (d < D)[:, None] & mine[None, :]
    m = tl.full([R], float("-inf"), tl.float32)
    l = tl.zeros([R], tl.float32)
    acc = tl.zeros([DP, R], tl.float32)
    for first in range(0, count, TOGETHER):
        heights, sums, tiles = (), (), ()
        for n in tl.static_range(TOGETHER):
            there, item = mine & (first + n < count), (first + n) * step
            # .cg: other programs have written these, and the first-level cache is not kept coherent.
            at = stats + item * 2 * used + rows
            heights = heights + (tl.load(at, mask=there, other=float("-inf"), cache_modifier=".cg"),)
            sums = sums + (tl.load(at + used, mask=there, other=0.0, cache_modifier=".cg"),)
            at = partial + (item * used + rows)[None, :] * D + d[:, None]
            tiles = tiles + (tl.load(at, mask=inside & (first + n < count), other=0.0, cache_modifier=".cg"),)
        top = m
        for n in tl.static_range(TOGETHER):
            top = tl.maximum(top, heights[n])
        finite = tl.where(top == float("-inf"), 0.0, top)
        alpha = tl.exp2(m - finite)
        l = l * alpha
        acc = acc * alpha[None, :]
        for n in tl.static_range(TOGETHER):
            weight = tl.exp2(heights[n] - finite)
            l += sums[n] * weight
            acc += tiles[n].to(tl.float32) * (sums[n] * weight)[None, :]
        m = top
    return m, l, acc


@triton.jit
def finish(
    rows, m, l, acc, query, new_keys, new_values, new_mask, out, scale, used, length,
    D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, TB: tl.constexpr, WINDOW: tl.constexpr, NEW: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The output of one head in one sequence (all pointers are theirs), for R of its rows, from what `merge` found of
    its stored tokens. New tokens come in blocks of `TB`."""
    d = tl.arange(0, DP)
    mine = rows < used
    inside = (d < D)[:, None] & mine[None, :]
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
