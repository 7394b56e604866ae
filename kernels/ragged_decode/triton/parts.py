"""Keys and values of one head in its own codec, for one item of the work list.

Codes stay integers in the products; scales and centres are applied to logits and weights, so that a code costs little
more than its load. CODEC is the id of a codec, 0 for the cache dtype; P the padded size of its tiles. The query and the
accumulators of a head are tuples of tiles, as the codec divides a vector.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.int4.triton import asked4, first4, keep4, logits4, mixed4
from kvcompile.kernels.codecs.int8.triton import INT8, asked8, first8, keep8, logits8, mixed8
from kvcompile.kernels.tiles import elements, product


@triton.jit
def asked(query, rows, used, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
          DTYPE: tl.constexpr):  # fmt: skip
    """The query in the tiles that the keys' codec needs, and its sums by group."""
    if CODEC == 0:
        return (elements(query, rows, used, 1, D, DP, D).to(DTYPE),), ()
    elif CODEC == INT8:
        return asked8(query, rows, used, D, G, P, DTYPE)
    else:
        return asked4(query, rows, used, D, G, P, DTYPE)


@triton.jit
def key_logits(parts, sums, exact, codes, scales, slot, valid, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
               G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Products f32 [rows, slots] of the query with the keys of the slots."""
    if CODEC == 0:
        d = tl.arange(0, DP)
        mask = valid[:, None] & (d < D)[None, :]
        k = tl.load(exact + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
        return product(parts[0], tl.trans(k))
    elif CODEC == INT8:
        return logits8(parts, sums, codes, scales, slot, valid, D, G, P, DTYPE)
    else:
        return logits4(parts, sums, codes, scales, slot, valid, D, G, P, DTYPE)


@triton.jit
def mixed(acc, alpha, weights, exact, codes, scales, slot, valid, CODEC: tl.constexpr, D: tl.constexpr,
          DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """`acc` times `alpha` plus the weighted values of the slots, tile by tile."""
    if CODEC == 0:
        d = tl.arange(0, DP)
        mask = valid[:, None] & (d < D)[None, :]
        v = tl.load(exact + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
        return (acc[0] * alpha[:, None] + product(weights.to(DTYPE), v),)
    elif CODEC == INT8:
        return mixed8(acc, alpha, weights, codes, scales, slot, valid, D, G, P, DTYPE)
    else:
        return mixed4(acc, alpha, weights, codes, scales, slot, valid, D, G, P, DTYPE)


@triton.jit
def first(value, has, rows, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr,
          P: tl.constexpr):  # fmt: skip
    """The accumulators, tile by tile: the value of slot 0 where it `has` been taken already, else 0."""
    used = has.to(tl.int32)
    one = rows * 0  # every row is row 0
    if CODEC == 0:
        return (elements(value, one, used, 1, D, DP, D),)
    elif CODEC == INT8:
        return first8(value, one, used, D, G, P)
    else:
        return first4(value, one, used, D, G, P)


@triton.jit
def keep(acc, out, rows, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """Store the accumulators as rows of D elements."""
    if CODEC == 0:
        d = tl.arange(0, DP)
        tl.store(out + rows[:, None] * D + d[None, :], acc[0], mask=(d < D)[None, :])
    elif CODEC == INT8:
        keep8(acc, out, rows, D, G, P)
    else:
        keep4(acc, out, rows, D, G, P)
