"""Encoding in Triton, for what stores: any codec of whole numbers, by its groups.

Elements are loaded as bytes need them, those that share one in tiles of their own. Codes of 3 bits come in halves, as
the high bits of byte i's elements share a byte with those of byte i + n / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcompile.kernels.codecs.integers.triton.split import (
    bits_of,
    byte_of,
    group_count,
    padded,
    row_bytes,
    size_of,
    start_of,
    stored_elements,
)  # fmt: skip
from kvcompile.kernels.tiles import transformed

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
    return (tl.minimum(tl.maximum(code, -HALF), HALF - 1) + HALF).to(tl.int32)


@triton.constexpr_function
def per_byte(bits):
    """Codes of a byte; of 3 bits, those whose low two are in it."""
    return 4 if bits == 3 else 8 // bits


@triton.constexpr_function
def levels(bits):
    """Half of the numbers that a code may be."""
    return 2.0 ** (bits - 1)


@triton.jit
def _bytes(CODEC: tl.constexpr, D: tl.constexpr, G: tl.constexpr, LEAST: tl.constexpr):
    """The bytes of a group, without those of high bits, and which of them there are."""
    COUNT: tl.constexpr = size_of(CODEC, D, G) // per_byte(bits_of(CODEC, D, G))
    if bits_of(CODEC, D, G) == 3:
        HALF: tl.constexpr = padded(COUNT // 2, LEAST // 2)
        i = tl.arange(0, 2 * HALF)
        return i // HALF * (COUNT // 2) + i % HALF, i % HALF < COUNT // 2
    else:
        i = tl.arange(0, padded(COUNT, LEAST))
        return i, i < COUNT


@triton.jit
def _largest(parts, AXIS: tl.constexpr):
    """The largest magnitude in all parts, over an axis."""
    found = tl.abs(parts[0])
    for j in tl.static_range(1, len(parts)):
        found = tl.maximum(found, tl.abs(parts[j]))
    return tl.max(found, AXIS)


@triton.jit
def _packed(parts, scale, BITS: tl.constexpr):
    """Bytes of the elements, of which part j has those that come j-th in their bytes; and apart from them, in bits 0 to
    3, the high bits of codes of 3 bits."""
    PER: tl.constexpr = per_byte(BITS)
    found = (parts[0] * 0.0).to(tl.int32)
    high = found
    for j in tl.static_range(PER):
        code = code_of(parts[j], scale, levels(BITS))
        if BITS == 3:
            found |= (code & 3) << 2 * j
            high |= code >> 2 << j
        else:
            found |= code << BITS * j
    return found, high


@triton.jit
def put(x, codes, scales, slot, CODEC: tl.constexpr, D: tl.constexpr):
    """Quantise the vector at `x` into the codes and the scales of a slot."""
    for g in tl.static_range(group_count(CODEC, D)):
        _put(x, codes + slot * row_bytes(CODEC, D), scales + slot * group_count(CODEC, D), g, CODEC, D)


@triton.jit
def _put(x, codes, scales, G: tl.constexpr, CODEC: tl.constexpr, D: tl.constexpr):
    BITS: tl.constexpr = bits_of(CODEC, D, G)
    PER: tl.constexpr = per_byte(BITS)
    i, inside = _bytes(CODEC, D, G, 2)
    parts = ()
    for j in tl.static_range(PER):
        at = x + start_of(CODEC, D, G) + PER * i + j
        parts = parts + (tl.load(at, mask=inside, other=0.0).to(tl.float32),)
    scale = scale_of(_largest(parts, 0), levels(BITS))
    tl.store(scales + G, scale)
    packed, high = _packed(parts, scale, BITS)
    codes += byte_of(CODEC, D, G)
    tl.store(codes + i, packed.to(tl.uint8), mask=inside)
    if BITS == 3:
        COUNT: tl.constexpr = size_of(CODEC, D, G) // 8
        HALF: tl.constexpr = i.shape[0] // 2
        k = tl.arange(0, HALF)
        both = tl.sum(tl.reshape(high << i // COUNT * 4, [2, HALF]), 0)
        tl.store(codes + 2 * COUNT + k, both.to(tl.uint8), mask=k < COUNT)


@triton.jit
def copy(at, step, COUNT: tl.constexpr):
    """What is at `at` to the same place `step` further on."""
    i = tl.arange(0, padded(COUNT))
    tl.store(at + step + i, tl.load(at + i, mask=i < COUNT), mask=i < COUNT)


@triton.jit
def move(codes, scales, slot, step, CODEC: tl.constexpr, D: tl.constexpr):
    """Copy what is in a slot to the one `step` slots on."""
    BYTES: tl.constexpr = row_bytes(CODEC, D)
    GROUPS: tl.constexpr = group_count(CODEC, D)
    copy(codes + slot * BYTES, step * BYTES, BYTES)
    copy(scales + slot * GROUPS, step * GROUPS, GROUPS)


@triton.jit
def fill(prompt, matrix, mean, codes, scales, anchor, token, slot, valid, first, CODEC: tl.constexpr, D: tl.constexpr,
         N: tl.constexpr, TRANSFORMED: tl.constexpr):  # fmt: skip
    """Quantise a block of slots, and keep the row that is token 0 of a sink (`first`) exactly."""
    for g in tl.static_range(group_count(CODEC, D)):
        _fill(prompt, matrix, mean, codes, scales, anchor, token, slot, valid, first, g, CODEC, D, N, TRANSFORMED)
    if stored_elements(CODEC, D) < D:
        if tl.program_id(0) == 0:  # the block that may have such a row
            e = stored_elements(CODEC, D) + tl.arange(0, padded(D - stored_elements(CODEC, D), 16))
            x = transformed(prompt, token, first, matrix, mean, e, e < D, D, N, TRANSFORMED)
            at = anchor + slot[:, None] * 0 + e[None, :]
            tl.store(at, x.to(anchor.dtype.element_ty), mask=first[:, None] & (e < D)[None, :])


@triton.jit
def _fill(prompt, matrix, mean, codes, scales, anchor, token, slot, valid, first, G: tl.constexpr, CODEC: tl.constexpr,
          D: tl.constexpr, N: tl.constexpr, TRANSFORMED: tl.constexpr):  # fmt: skip
    BITS: tl.constexpr = bits_of(CODEC, D, G)
    PER: tl.constexpr = per_byte(BITS)
    i, inside = _bytes(CODEC, D, G, 16)
    e = start_of(CODEC, D, G) + PER * i
    parts = ()
    for j in tl.static_range(PER):
        part = transformed(prompt, token, valid, matrix, mean, e + j, inside, D, N, TRANSFORMED)
        parts = parts + (part,)
        at = anchor + slot[:, None] * 0 + (e + j)[None, :]
        tl.store(at, part.to(anchor.dtype.element_ty), mask=first[:, None] & inside[None, :])
    scale = scale_of(_largest(parts, 1), levels(BITS))
    tl.store(scales + slot * group_count(CODEC, D) + G, scale, mask=valid)
    packed, high = _packed(parts, scale[:, None], BITS)
    row = codes + slot[:, None] * row_bytes(CODEC, D) + byte_of(CODEC, D, G)
    tl.store(row + i[None, :], packed.to(tl.uint8), mask=valid[:, None] & inside[None, :])
    if BITS == 3:
        COUNT: tl.constexpr = size_of(CODEC, D, G) // 8
        HALF: tl.constexpr = i.shape[0] // 2
        k = tl.arange(0, HALF)
        both = tl.sum(tl.reshape(high << (i // COUNT * 4)[None, :], [N, 2, HALF]), 1)
        tl.store(row + 2 * COUNT + k[None, :], both.to(tl.uint8), mask=valid[:, None] & (k < COUNT)[None, :])
