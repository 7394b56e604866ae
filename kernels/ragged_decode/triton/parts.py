"""Keys and values of one head in its own codec, for one item of the work list.

Codes stay integers in the products; scales and centres are applied to logits and weights, so that a code costs little
more than its load. CODEC is the id of a codec, 0 for the cache dtype; P the padded size of its tiles. The query and the
accumulators of a head are tuples of tiles, as the codec divides a vector; rows are their last dimension, for the tensor
cores' products are narrow on that side alone (8), and a head has few queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.int4.triton import asked4, first4, keep4, logits4, mixed4
from kvcompile.kernels.codecs.int8.triton import INT8, asked8, first8, keep8, logits8, mixed8
from kvcompile.kernels.tiles import columns, product

WIDE = tl.constexpr(64)
"""Elements of a tile of exact vectors: a tile is held in registers as a whole."""


@triton.jit
def asked(query, rows, used, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
          DTYPE: tl.constexpr):  # fmt: skip
    """The query in the tiles that the keys' codec needs, and its sums by group."""
    if CODEC == 0:
        parts = ()
        for first in tl.static_range(0, DP, WIDE):
            parts = parts + (columns(query + first, rows, used, 1, D - first, min(DP, WIDE), D).to(DTYPE),)
        return parts, ()
    elif CODEC == INT8:
        return asked8(query, rows, used, D, G, P, DTYPE)
    else:
        return asked4(query, rows, used, D, G, P, DTYPE)


@triton.jit
def key_logits(parts, sums, exact, codes, scales, slot, valid, scale, CODEC: tl.constexpr, D: tl.constexpr,
               DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Products f32 [slots, rows] of the keys of the slots with the queries, times `scale`."""
    if CODEC == 0:
        for i in tl.static_range(-(-DP // WIDE)):
            d = i * WIDE + tl.arange(0, min(DP, WIDE))
            k = tl.load(exact + slot[:, None] * D + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0)
            if i == 0:
                total = product(k, parts[i])
            else:
                total = tl.dot(k, parts[i], total, input_precision="tf32x3")
        return total * scale
    elif CODEC == INT8:
        return logits8(parts, sums, codes, scales, slot, valid, scale, D, G, P, DTYPE)
    else:
        return logits4(parts, sums, codes, scales, slot, valid, scale, D, G, P, DTYPE)


@triton.jit
def mixed(acc, alpha, weights, exact, codes, scales, slots, valid, CODEC: tl.constexpr, D: tl.constexpr,
          DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """`acc` times `alpha` plus the weighted values of all blocks of slots, tile by tile; `weights` are at most 1."""
    if CODEC == 0:
        new = ()
        for i in tl.static_range(-(-DP // WIDE)):
            d = i * WIDE + tl.arange(0, min(DP, WIDE))
            # Loaded with elements first, as the product needs them: a tile that is turned round cannot be loaded
            # asynchronously.
            for half in tl.static_range(len(slots)):
                mask = valid[half][None, :] & (d < D)[:, None]
                v = tl.load(exact + slots[half][None, :] * D + d[:, None], mask=mask, other=0.0)
                if half == 0:
                    one = product(v, weights[half].to(DTYPE))
                else:
                    one = tl.dot(v, weights[half].to(DTYPE), one, input_precision="tf32x3")
            # Not summed up in the products: tensor cores cut off where they add, and a long sum would drift.
            new = new + (acc[i] * alpha[None, :] + one,)
        return new
    elif CODEC == INT8:
        return mixed8(acc, alpha, weights, codes, scales, slots, valid, D, G, P, DTYPE, N)
    else:
        return mixed4(acc, alpha, weights, codes, scales, slots, valid, D, G, P, DTYPE, N)


@triton.jit
def first(value, taken, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
          R: tl.constexpr):  # fmt: skip
    """The accumulators f32 [elements, rows], tile by tile: the value of slot 0 where it is `taken` already, else 0."""
    if CODEC == 0:
        d = tl.arange(0, min(DP, WIDE))
        new = ()
        for first in tl.static_range(0, DP, WIDE):
            one = tl.load(value + first + d, mask=(first + d < D) & taken, other=0.0).to(tl.float32)
            new = new + (one[:, None] + tl.zeros([min(DP, WIDE), R], tl.float32),)
        return new
    elif CODEC == INT8:
        return first8(value, taken, D, G, P, R)
    else:
        return first4(value, taken, D, G, P, R)


@triton.jit
def keep(acc, out, rows, used, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, G: tl.constexpr,
         P: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Store the accumulators as rows of D elements."""
    if CODEC == 0:
        for i in tl.static_range(-(-DP // WIDE)):
            d = i * WIDE + tl.arange(0, min(DP, WIDE))
            tl.store(out + rows[None, :] * D + d[:, None], acc[i], mask=(d < D)[:, None] & (rows < used)[None, :])
    elif CODEC == INT8:
        keep8(acc, out, rows, used, D, G, P, DTYPE)
    else:
        keep4(acc, out, rows, used, D, G, P, DTYPE)
