"""int4 in the Triton kernels: what `append` puts, `compact` fills, and `ragged_decode` multiplies.

P is half the number of a group's elements, padded, and in `ragged_decode` a quarter: codes are read four at a time and
never interleaved, so that every fourth element is in a tile of its own. `asked4`, `first4` and `mixed4` give tuples
with the tiles of every group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.int4 import CODEC
from kvcompile.kernels.codecs.integers.triton import asked, code_of, keep, logits, mixed, scale_of, start
from kvcompile.kernels.tiles import transformed

INT4 = tl.constexpr(CODEC.id)
BITS = tl.constexpr(CODEC.bits)
PER = tl.constexpr(16 // CODEC.bits)
"""Codes in 16 bits."""


@triton.jit
def put4(x, codes, scales, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """Quantise the vector at `x` into a row of codes and one of scales."""
    SIZE: tl.constexpr = D // G
    e = tl.arange(0, P)
    inside = e < SIZE // 2
    for g in tl.static_range(G):
        even = tl.load(x + g * SIZE + 2 * e, mask=inside, other=0.0).to(tl.float32)
        odd = tl.load(x + g * SIZE + 2 * e + 1, mask=inside, other=0.0).to(tl.float32)
        scale = scale_of(tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 0), 8.0)
        tl.store(scales + g, scale)
        packed = code_of(even, scale, 8.0) | (code_of(odd, scale, 8.0) << 4)
        tl.store(codes + g * (SIZE // 2) + e, packed, mask=inside)


@triton.jit
def fill4(prompt, matrix, mean, codes, scales, anchor, token, slot, valid, first, D: tl.constexpr,
          G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, TRANSFORMED: tl.constexpr):  # fmt: skip
    """Quantise a block of slots, and keep the row that is token 0 of a sink (`first`) exactly."""
    SIZE: tl.constexpr = D // G
    HALF: tl.constexpr = SIZE // 2
    e = tl.arange(0, P)
    inside = (e < HALF)[None, :]
    for g in range(G):
        even = transformed(prompt, token, valid, matrix, mean, g * SIZE, 2, HALF, P, D, N, TRANSFORMED)
        odd = transformed(prompt, token, valid, matrix, mean, g * SIZE + 1, 2, HALF, P, D, N, TRANSFORMED)
        scale = scale_of(tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1), 8.0)
        tl.store(scales + slot * G + g, scale, mask=valid)
        packed = code_of(even, scale[:, None], 8.0) | (code_of(odd, scale[:, None], 8.0) << 4)
        tl.store(codes + slot[:, None] * (D // 2) + g * HALF + e[None, :], packed, mask=valid[:, None] & inside)
        at = anchor + slot[:, None] * 0 + g * SIZE + 2 * e[None, :]
        tl.store(at, even.to(anchor.dtype.element_ty), mask=first[:, None] & inside)
        tl.store(at + 1, odd.to(anchor.dtype.element_ty), mask=first[:, None] & inside)


@triton.jit
def asked4(query, rows, used, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """See `integers.asked`."""
    return asked(query, rows, used, PER, BITS, D, G, P, DTYPE)


@triton.jit
def logits4(parts, sums, codes, scales, slot, valid, scale, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
            DTYPE: tl.constexpr):  # fmt: skip
    """See `integers.logits`."""
    return logits(parts, sums, codes, scales, slot, valid, scale, PER, BITS, D, G, P, DTYPE)


@triton.jit
def mixed4(acc, alpha, weights, codes, scales, slots, valid, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
           DTYPE: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """See `integers.mixed`."""
    return mixed(acc, alpha, weights, codes, scales, slots, valid, PER, BITS, D, G, P, DTYPE, N)


@triton.jit
def first4(value, taken, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """See `integers.start`."""
    return start(value, taken, PER, D, G, P, R)


@triton.jit
def keep4(acc, out, rows, used, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """See `integers.keep`."""
    keep(acc, out, rows, used, PER, BITS, D, G, P, DTYPE)
