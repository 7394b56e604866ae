"""int8 in the Triton kernels: what `append` puts, `compact` fills, and `ragged_decode` multiplies.

P is the number of a group's elements, padded, and in `ragged_decode` half of it: codes are read two at a time, and even
and odd elements are tiles of their own. `asked8`, `first8` and `mixed8` give tuples with the tiles of every group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.int8 import CODEC
from kvcompile.kernels.codecs.integers.triton import asked, code_of, keep, logits, mixed, scale_of, start
from kvcompile.kernels.tiles import transformed

INT8 = tl.constexpr(CODEC.id)
BITS = tl.constexpr(CODEC.bits)
PER = tl.constexpr(16 // CODEC.bits)
"""Codes in 16 bits."""


@triton.jit
def put8(x, codes, scales, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """Quantise the vector at `x` into a row of codes and one of scales."""
    SIZE: tl.constexpr = D // G
    e = tl.arange(0, P)
    for g in tl.static_range(G):
        part = tl.load(x + g * SIZE + e, mask=e < SIZE, other=0.0).to(tl.float32)
        scale = scale_of(tl.max(tl.abs(part), 0), 128.0)
        tl.store(scales + g, scale)
        tl.store(codes + g * SIZE + e, code_of(part, scale, 128.0), mask=e < SIZE)


@triton.jit
def fill8(prompt, matrix, mean, codes, scales, anchor, token, slot, valid, first, D: tl.constexpr,
          G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, TRANSFORMED: tl.constexpr):  # fmt: skip
    """Quantise a block of slots, and keep the row that is token 0 of a sink (`first`) exactly."""
    SIZE: tl.constexpr = D // G
    e = tl.arange(0, P)
    inside = (e < SIZE)[None, :]
    for g in range(G):
        x = transformed(prompt, token, valid, matrix, mean, g * SIZE, 1, SIZE, P, D, N, TRANSFORMED)
        scale = scale_of(tl.max(tl.abs(x), 1), 128.0)
        tl.store(scales + slot * G + g, scale, mask=valid)
        code = code_of(x, scale[:, None], 128.0)
        tl.store(codes + slot[:, None] * D + g * SIZE + e[None, :], code, mask=valid[:, None] & inside)
        at = anchor + slot[:, None] * 0 + g * SIZE + e[None, :]
        tl.store(at, x.to(anchor.dtype.element_ty), mask=first[:, None] & inside)


@triton.jit
def asked8(query, rows, used, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """See `integers.asked`."""
    return asked(query, rows, used, PER, BITS, D, G, P, DTYPE)


@triton.jit
def logits8(parts, sums, codes, scales, slot, valid, scale, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
            DTYPE: tl.constexpr):  # fmt: skip
    """See `integers.logits`."""
    return logits(parts, sums, codes, scales, slot, valid, scale, PER, BITS, D, G, P, DTYPE)


@triton.jit
def mixed8(acc, alpha, weights, codes, scales, slots, valid, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
           DTYPE: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """See `integers.mixed`."""
    return mixed(acc, alpha, weights, codes, scales, slots, valid, PER, BITS, D, G, P, DTYPE, N)


@triton.jit
def first8(value, taken, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """See `integers.start`."""
    return start(value, taken, PER, D, G, P, R)


@triton.jit
def keep8(acc, out, rows, used, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):
    """See `integers.keep`."""
    keep(acc, out, rows, used, PER, BITS, D, G, P, DTYPE)
