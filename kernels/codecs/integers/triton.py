"""Codes and scales in Triton."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from kvcompile.kernels.tiles import columns, product

TINY = tl.constexpr(torch.finfo(torch.float16).tiny)
HUGE = tl.constexpr(torch.finfo(torch.float16).max)


@triton.jit
def scale_of(largest, HALF: tl.constexpr):
    """A group's scale by its largest element, as float16 holds it."""
    return tl.minimum(tl.maximum(largest / HALF, TINY), HUGE).to(tl.float16)


@triton.jit
def code_of(x, scale, HALF: tl.constexpr):
    """Codes of elements; `scale` is of a shape that spreads over them."""
    # A scale of the elements' own shape, and a division rounded to nearest: at the edge of two codes an approximate
    # quotient would fall on the other side than the reference's.
    code = tl.floor(tl.div_rn(x, scale.to(tl.float32) + x * 0.0))
    return (tl.minimum(tl.maximum(code, -HALF), HALF - 1) + HALF).to(tl.uint8)


COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")
"""The interpreter has no inline assembly."""


@triton.jit
def units(codes, slot, valid, group, COUNT: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr,
          FIRST: tl.constexpr):  # fmt: skip
    """Codes of one group of the slots, 16 bits at a time, of which there are `COUNT`: int16 [slots, PADDED], or
    [PADDED, slots] where elements come `FIRST`. `STRIDE` is that of slots, in units of 16 bits."""
    d = tl.arange(0, PADDED)
    at = codes.to(tl.pointer_type(tl.int16)) + group * COUNT
    if FIRST:
        mask = (d < COUNT)[:, None] & valid[None, :]
        unit = tl.load(at + slot[None, :] * STRIDE + d[:, None], mask=mask, other=0)
    else:
        mask = valid[:, None] & (d < COUNT)[None, :]
        unit = tl.load(at + slot[:, None] * STRIDE + d[None, :], mask=mask, other=0)
    return unit


@triton.jit
def spread4(unit, DTYPE: tl.constexpr):
    """The four codes of every 16 bits, as four tiles of floats. In half precision, bits of a code are set in the
    mantissa of 1024 (then a step of it is 1) or of 64 (bits 4 to 7: a step of these is 1 as well), so that two codes
    take one instruction; `offset4` says what is then to be taken off. No number is rounded."""
    if DTYPE != tl.float16:
        tiles = (
            (unit & 15).to(DTYPE), (unit >> 4 & 15).to(DTYPE), (unit >> 8 & 15).to(DTYPE), (unit >> 12 & 15).to(DTYPE),
        )  # fmt: skip
    elif COMPILED:
        # Table 0xea of lop3 is (a & b) | c. Two neighbours along the tile's last dimension share a register.
        tiles = tl.inline_asm_elementwise(
            """{ .reg .b32 high;
            shr.b32 high, $4, 8;
            lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $1, $4, 0x00f000f0, 0x54005400, 0xea;
            lop3.b32 $2, high, 0x000f000f, 0x64006400, 0xea;
            lop3.b32 $3, high, 0x00f000f0, 0x54005400, 0xea; }""",
            "=&r,=&r,=&r,=&r,r", [unit], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        tiles = (
            (unit & 0x000F | 0x6400).to(tl.int16).to(tl.float16, bitcast=True),
            (unit & 0x00F0 | 0x5400).to(tl.int16).to(tl.float16, bitcast=True),
            (unit >> 8 & 0x000F | 0x6400).to(tl.int16).to(tl.float16, bitcast=True),
            (unit >> 8 & 0x00F0 | 0x5400).to(tl.int16).to(tl.float16, bitcast=True),
        )
    return tiles


@triton.jit
def spread8(unit, DTYPE: tl.constexpr):
    """The two codes of every 16 bits as two tiles of floats, as `spread4`: in half precision 1024 + code."""
    if DTYPE != tl.float16:
        tiles = ((unit & 255).to(DTYPE), (unit >> 8 & 255).to(DTYPE))
    elif COMPILED:
        # prmt picks bytes: code, 0x64, code, 0x64.
        tiles = tl.inline_asm_elementwise(
            """prmt.b32 $0, $2, 0x64646464, 0x4240;
            prmt.b32 $1, $2, 0x64646464, 0x4341;""",
            "=&r,=&r,r", [unit], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        tiles = (
            (unit & 0x00FF | 0x6400).to(tl.int16).to(tl.float16, bitcast=True),
            (unit >> 8 & 0x00FF | 0x6400).to(tl.int16).to(tl.float16, bitcast=True),
        )
    return tiles


@triton.jit
def spread(unit, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """`spread4` or `spread8`."""
    if BITS == 4:
        tiles = spread4(unit, DTYPE)
    else:
        tiles = spread8(unit, DTYPE)
    return tiles


@triton.constexpr_function
def offset(bits, part, dtype):
    """What the tile `part` of `spread4` or `spread8` lies above the numbers that its codes stand for, in steps."""
    centre = 2 ** (bits - 1) - 0.5
    return centre + ((64 if bits == 4 and part % 2 else 1024) if dtype == tl.float16 else 0)


@triton.jit
def group_scales(scales, slot, valid, G: tl.constexpr):
    """Scales of the slots by group, a tuple of f32 [slots]; two or four groups in one load, as loads of 16 bits cannot
    be asynchronous."""
    found = ()
    if G == 2:
        words = tl.load(scales.to(tl.pointer_type(tl.int32)) + slot, mask=valid, other=0)
        for g in tl.static_range(G):
            found = found + ((words >> 16 * g).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
    elif G == 4:
        words = tl.load(scales.to(tl.pointer_type(tl.int64)) + slot, mask=valid, other=0)
        for g in tl.static_range(G):
            found = found + ((words >> 16 * g).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
    else:
        for g in tl.static_range(G):
            found = found + (tl.load(scales + slot * G + g, mask=valid, other=0.0).to(tl.float32),)
    return found


@triton.jit
def asked(query, rows, used, PER: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
          P: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The queries by group as their products with the `PER` tiles of codes need them, every `PER`-th element in a tile
    of its own [P, rows], and by group what these products lie too high, [rows]: of codes as c + o_j, the sum of q o_j.
    """
    SIZE: tl.constexpr = D // G
    parts = ()
    sums = ()
    for g in tl.static_range(G):
        high = rows * 0.0
        for j in tl.static_range(PER):
            part = columns(query + g * SIZE + j, rows, used, PER, SIZE // PER, P, D).to(DTYPE)
            parts = parts + (part,)
            high += tl.sum(part.to(tl.float32), 0) * offset(BITS, j, DTYPE)
        sums = sums + (high,)
    return parts, sums


@triton.jit
def logits(parts, sums, codes, scales, slot, valid, scale, PER: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
           G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Products f32 [slots, rows] of the keys of the slots with the queries, times `scale`, summed over groups:
    (sum of q (c + o_j) - sum of q o_j) s."""
    SIZE: tl.constexpr = D // G
    by_group = group_scales(scales, slot, valid, G)
    for g in tl.static_range(G):
        tiles = spread(units(codes, slot, valid, g, SIZE // PER, P, D // PER, False), BITS, DTYPE)
        one = product(tiles[0], parts[g * PER])
        for j in tl.static_range(1, PER):
            one = tl.dot(tiles[j], parts[g * PER + j], one, input_precision="tf32x3")
        one = (one - sums[g][None, :]) * (by_group[g] * scale)[:, None]
        if g == 0:
            total = one
        else:
            total += one
    return total


@triton.jit
def mixed(acc, alpha, weights, codes, scales, slots, valid, PER: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
          G: tl.constexpr, P: tl.constexpr, DTYPE: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """`acc` times `alpha` plus the sums of w s (c + o_j), and of w s, by group, over all blocks of slots."""
    SIZE: tl.constexpr = D // G
    by_group = ()
    for half in tl.static_range(len(slots)):
        by_group = by_group + (group_scales(scales, slots[half], valid[half], G),)
    new = ()
    for g in tl.static_range(G):
        found = ()
        for half in tl.static_range(len(slots)):
            scaled = (weights[half] * by_group[half][g][:, None]).to(DTYPE)
            tiles = spread(units(codes, slots[half], valid[half], g, SIZE // PER, P, D // PER, True), BITS, DTYPE)
            tiles = tiles + (first_row(N, DTYPE),)
            more = ()
            for j in tl.static_range(PER + 1):
                if half == 0:
                    more = more + (product(tiles[j], scaled),)
                else:
                    more = more + (tl.dot(tiles[j], scaled, found[j], input_precision="tf32x3"),)
            found = more
        # Not summed up in the products: tensor cores cut off where they add, and a long sum would drift.
        for j in tl.static_range(PER + 1):
            new = new + (acc[g * (PER + 1) + j] * alpha[None, :] + found[j],)
    return new


@triton.jit
def start(value, taken, PER: tl.constexpr, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """The accumulators by group: `PER` tiles [P, rows] of the vector at `value` where it is `taken`, else 0, and one
    [16, rows] that sums weights times scales."""
    SIZE: tl.constexpr = D // G
    e = tl.arange(0, P)
    mask = (e < SIZE // PER) & taken
    new = ()
    for g in tl.static_range(G):
        for j in tl.static_range(PER):
            one = tl.load(value + g * SIZE + j + PER * e, mask=mask, other=0.0).to(tl.float32)
            new = new + (one[:, None] + tl.zeros([P, R], tl.float32),)
        new = new + (tl.zeros([16, R], tl.float32),)
    return new


@triton.jit
def first_row(N: tl.constexpr, DTYPE: tl.constexpr):
    """Ones in the first row, else zeros [16, N]: a product with it sums columns as products with codes do."""
    return (tl.arange(0, 16)[:, None] + tl.zeros([16, N], tl.int32) == 0).to(DTYPE)


@triton.jit
def keep(acc, out, rows, used, PER: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
         P: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Store the accumulators as rows of D elements: sum(w s (c + o_j)) - o_j sum(w s)."""
    SIZE: tl.constexpr = D // G
    d = tl.arange(0, P)
    mask = (d < SIZE // PER)[:, None] & (rows < used)[None, :]
    for g in tl.static_range(G):
        total = tl.sum(acc[g * (PER + 1) + PER], 0)[None, :]
        for j in tl.static_range(PER):
            at = out + rows[None, :] * D + g * SIZE + PER * d[:, None] + j
            tl.store(at, acc[g * (PER + 1) + j] - offset(BITS, j, DTYPE) * total, mask=mask)
