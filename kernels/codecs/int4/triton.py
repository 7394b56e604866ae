"""int4 in the Triton kernels: what `append` puts, `compact` fills, and `ragged_decode` multiplies.

P is half the number of a group's elements, padded: the two codes of a byte are never interleaved, even and odd elements
are tiles of their own. `asked4`, `first4` and `mixed4` give a tuple with an even and an odd tile for every group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.int4 import CODEC
from kvcompile.kernels.codecs.integers.triton import code_of, group_bytes, numbers, scale_of
from kvcompile.kernels.tiles import elements, product, transformed

INT4 = tl.constexpr(CODEC.id)


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
    """The query by group and parity, and its sums by group times the centre of the codes."""
    SIZE: tl.constexpr = D // G
    parts = ()
    sums = ()
    for g in tl.static_range(G):
        even = elements(query + g * SIZE, rows, used, 2, SIZE // 2, P, D).to(DTYPE)
        odd = elements(query + g * SIZE + 1, rows, used, 2, SIZE // 2, P, D).to(DTYPE)
        parts = parts + (even, odd)
        sums = sums + (7.5 * (tl.sum(even.to(tl.float32), 1) + tl.sum(odd.to(tl.float32), 1)),)
    return parts, sums


@triton.jit
def logits4(parts, sums, codes, scales, slot, valid, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
            DTYPE: tl.constexpr):  # fmt: skip
    """Products f32 [rows, slots] of the query with the keys of the slots, summed over groups:
    (q . c - 7.5 sum(q)) s."""
    SIZE: tl.constexpr = D // G
    for g in tl.static_range(G):
        scale = tl.load(scales + slot * G + g, mask=valid, other=0.0).to(tl.float32)
        c = group_bytes(codes, slot, valid, g, SIZE // 2, P, D // 2)
        one = product(parts[2 * g], tl.trans(numbers(c & 15, DTYPE)))
        one += product(parts[2 * g + 1], tl.trans(numbers(c >> 4, DTYPE)))
        one = (one - sums[g][:, None]) * scale[None, :]
        if g == 0:
            total = one
        else:
            total += one
    return total


@triton.jit
def mixed4(acc, alpha, weights, codes, scales, slot, valid, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
           DTYPE: tl.constexpr):  # fmt: skip
    """`acc` times `alpha` plus the weighted values of the slots: sum(w s c) - 7.5 sum(w s), by group and parity."""
    SIZE: tl.constexpr = D // G
    new = ()
    for g in tl.static_range(G):
        scale = tl.load(scales + slot * G + g, mask=valid, other=0.0).to(tl.float32)
        scaled = (weights * scale[None, :]).to(DTYPE)
        total = tl.sum(scaled.to(tl.float32), 1)[:, None]
        c = group_bytes(codes, slot, valid, g, SIZE // 2, P, D // 2)
        even = product(scaled, numbers(c & 15, DTYPE)) - 7.5 * total
        odd = product(scaled, numbers(c >> 4, DTYPE)) - 7.5 * total
        even += acc[2 * g] * alpha[:, None]
        odd += acc[2 * g + 1] * alpha[:, None]
        new = new + (even, odd)
    return new


@triton.jit
def first4(value, one, used, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """The accumulators by group and parity: the vector at `value` if `used`, else 0. `one` is row 0, for every row."""
    SIZE: tl.constexpr = D // G
    new = ()
    for g in tl.static_range(G):
        even = elements(value + g * SIZE, one, used, 2, SIZE // 2, P, D)
        odd = elements(value + g * SIZE + 1, one, used, 2, SIZE // 2, P, D)
        new = new + (even, odd)
    return new


@triton.jit
def keep4(acc, out, rows, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """Store the accumulators as rows of D elements."""
    SIZE: tl.constexpr = D // G
    d = tl.arange(0, P)
    for g in tl.static_range(G):
        at = out + rows[:, None] * D + g * SIZE + 2 * d[None, :]
        tl.store(at, acc[2 * g], mask=(d < SIZE // 2)[None, :])
        tl.store(at + 1, acc[2 * g + 1], mask=(d < SIZE // 2)[None, :])
