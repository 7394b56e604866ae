"""int8 in the Triton kernels: what `append` puts, `compact` fills, and `ragged_decode` multiplies.

P is the number of a group's elements, padded. `asked8`, `first8` and `mixed8` give a tuple with a tile for every group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.int8 import CODEC
from kvcompile.kernels.codecs.integers.triton import code_of, group_bytes, numbers, scale_of
from kvcompile.kernels.tiles import elements, product, transformed

INT8 = tl.constexpr(CODEC.id)


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
    """The query by group, and its sums by group times the centre of the codes."""
    SIZE: tl.constexpr = D // G
    parts = ()
    sums = ()
    for g in tl.static_range(G):
        part = elements(query + g * SIZE, rows, used, 1, SIZE, P, D).to(DTYPE)
        parts = parts + (part,)
        sums = sums + (127.5 * tl.sum(part.to(tl.float32), 1),)
    return parts, sums


@triton.jit
def logits8(parts, sums, codes, scales, slot, valid, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
            DTYPE: tl.constexpr):  # fmt: skip
    """Products f32 [rows, slots] of the query with the keys of the slots, summed over groups:
    (q . c - 127.5 sum(q)) s."""
    SIZE: tl.constexpr = D // G
    for g in tl.static_range(G):
        scale = tl.load(scales + slot * G + g, mask=valid, other=0.0).to(tl.float32)
        c = group_bytes(codes, slot, valid, g, SIZE, P, D)
        one = product(parts[g], tl.trans(numbers(c, DTYPE)))
        one = (one - sums[g][:, None]) * scale[None, :]
        if g == 0:
            total = one
        else:
            total += one
    return total


@triton.jit
def mixed8(acc, alpha, weights, codes, scales, slot, valid, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
           DTYPE: tl.constexpr):  # fmt: skip
    """`acc` times `alpha` plus the weighted values of the slots: sum(w s c) - 127.5 sum(w s), by group."""
    SIZE: tl.constexpr = D // G
    new = ()
    for g in tl.static_range(G):
        scale = tl.load(scales + slot * G + g, mask=valid, other=0.0).to(tl.float32)
        scaled = (weights * scale[None, :]).to(DTYPE)
        total = tl.sum(scaled.to(tl.float32), 1)[:, None]
        c = group_bytes(codes, slot, valid, g, SIZE, P, D)
        one = acc[g] * alpha[:, None] + (product(scaled, numbers(c, DTYPE)) - 127.5 * total)
        new = new + (one,)
    return new


@triton.jit
def first8(value, one, used, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """The accumulators by group: the vector at `value` if `used`, else 0. `one` is row 0, for every row."""
    SIZE: tl.constexpr = D // G
    new = ()
    for g in tl.static_range(G):
        new = new + (elements(value + g * SIZE, one, used, 1, SIZE, P, D),)
    return new


@triton.jit
def keep8(acc, out, rows, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr):
    """Store the accumulators as rows of D elements."""
    SIZE: tl.constexpr = D // G
    d = tl.arange(0, P)
    for g in tl.static_range(G):
        tl.store(out + rows[:, None] * D + g * SIZE + d[None, :], acc[g], mask=(d < SIZE)[None, :])
