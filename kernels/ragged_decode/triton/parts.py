"""Keys and values of one head in its own codec, for one item of the work list.

Codes stay integers in the products; scales and centres are applied to logits and weights, so that a code costs little
more than its load. CODEC is the id of a codec, 0 for the cache dtype; S of how many numbers the place of its scales is
a multiple. The query and the accumulators of a head are tuples of tiles, as the codec divides a vector; rows are their
last dimension, for the tensor cores' products are narrow on that side alone (8), and a head has few queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.integers.triton import products
from kvcompile.kernels.tiles import columns, product

WIDE = tl.constexpr(64)
"""Elements of a tile of exact vectors: a tile is held in registers as a whole."""


@triton.jit
def asked(query, rows, used, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DTYPE: tl.constexpr):
    """The query in the tiles that the keys' codec needs, and its sums by group."""
    if CODEC == 0:
        parts = ()
        for first in tl.static_range(0, DP, WIDE):
            parts = parts + (columns(query + first, rows, used, 1, D - first, min(DP, WIDE), D).to(DTYPE),)
        return parts, ()
    else:
        return products.asked(query, rows, used, CODEC, D, DTYPE)


@triton.jit
def key_logits(parts, sums, exact, codes, scales, slot, valid, scale, CODEC: tl.constexpr, D: tl.constexpr,
               DP: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
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
    else:
        return products.logits(parts, sums, codes, scales, slot, valid, scale, CODEC, D, S, DTYPE)


@triton.jit
def mixed(acc, alpha, weights, exact, codes, scales, slots, valid, CODEC: tl.constexpr, D: tl.constexpr,
          DP: tl.constexpr, S: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr):  # fmt: skip
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
    else:
        return products.mixed(acc, alpha, weights, codes, scales, slots, valid, CODEC, D, S, DTYPE, N)


@triton.jit
def first(value, taken, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr):
    """The accumulators f32 [elements, rows], tile by tile: the value of slot 0 where it is `taken` already, else 0."""
    if CODEC == 0:
        d = tl.arange(0, min(DP, WIDE))
        new = ()
        for first in tl.static_range(0, DP, WIDE):
            one = tl.load(value + first + d, mask=(first + d < D) & taken, other=0.0).to(tl.float32)
            new = new + (one[:, None] + tl.zeros([min(DP, WIDE), R], tl.float32),)
        return new
    else:
        return products.start(value, taken, CODEC, D, R)


@triton.jit
def keep(acc, inverse, out, rows, used, CODEC: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DTYPE: tl.constexpr):
    """Store the accumulators, times the `inverse` of a row's sum of weights, as rows of D elements."""
    if CODEC == 0:
        for i in tl.static_range(-(-DP // WIDE)):
            d = i * WIDE + tl.arange(0, min(DP, WIDE))
            tl.store(
                out + rows[None, :] * D + d[:, None],
                acc[i] * inverse[None, :],
                mask=(d < D)[:, None] & (rows < used)[None, :],
            )
    else:
        products.keep(acc, inverse, out, rows, used, CODEC, D, DTYPE)
