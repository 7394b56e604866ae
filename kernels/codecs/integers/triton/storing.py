"""Encoding in Triton, for what stores: any codec of whole numbers, by its groups.

Elements are loaded as bytes need them, those that share one in tiles of their own. Codes of 3 bits come in halves, as
the high bits of byte i's elements share a byte with those of byte i + n / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcompile.kernels.codecs.integers import LESS, steps
from kvcompile.kernels.codecs.integers.triton.split import (
    bits_of,
    byte_of,
    group_count,
    norm_kept,
    padded,
    row_bytes,
    size_of,
    start_of,
    stored_elements,
)  # fmt: skip
from kvcompile.kernels.tiles import transformed

TINY = tl.constexpr(torch.finfo(torch.float16).tiny)
HUGE = tl.constexpr(torch.finfo(torch.float16).max)


# Of `integers.steps`, how many there are, and the first one in tenths; each is a tenth more than the one before.
STEPS = {bits: (len(steps(bits)), round(10 * steps(bits)[0])) for bits in (2, 3, 4, 8)}
EACH_LESS = tl.constexpr(LESS)


@triton.constexpr_function
def step_count(bits):
    """Steps between codes that are tried."""
    return STEPS[bits][0]


@triton.constexpr_function
def first_tenths(bits):
    """The first of them, in tenths."""
    return STEPS[bits][1]


@triton.jit
def level_of(unit, codes, HALF: tl.constexpr):
    """Levels of elements `unit` whose largest magnitude is 1, of which `codes` codes reach to it."""
    return tl.minimum(tl.maximum(tl.floor(unit * codes), -HALF), HALF - 1) + 0.5


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
    """The largest magnitude in all parts, over an axis that stays."""
    found = tl.abs(parts[0])
    for j in tl.static_range(1, len(parts)):
        found = tl.maximum(found, tl.abs(parts[j]))
    return tl.max(found, AXIS, keep_dims=True)


@triton.jit
def _along(units, inside, codes, AXIS: tl.constexpr, BITS: tl.constexpr):
    """The product of groups with their levels, and these with themselves, over an axis that stays."""
    along = units[0] * 0.0
    square = units[0] * 0.0
    for j in tl.static_range(len(units)):
        # Elements outside are 0, whose level is not.
        level = tl.where(inside, level_of(units[j], codes, levels(BITS)), 0.0)
        along += level * units[j]
        square += level * level
    return tl.sum(along, AXIS, keep_dims=True), tl.sum(square, AXIS, keep_dims=True)


@triton.jit
def _rounded(parts, inside, AXIS: tl.constexpr, BITS: tl.constexpr, NORM: tl.constexpr):
    """Of groups of elements, of which part j has those that come j-th in their bytes: as shares of their largest, how
    many codes reach to that, and scales, as float16 holds them. `kernels.codecs.integers` says which."""
    HALF: tl.constexpr = levels(BITS)
    most = tl.minimum(tl.maximum(_largest(parts, AXIS), TINY * HALF), HUGE * HALF)
    units = ()
    for j in tl.static_range(len(parts)):
        # Rounded to nearest: at the edge of two codes an approximate quotient would fall on the other side than the
        # reference's.
        unit = tl.div_rn(parts[j], most + parts[j] * 0.0)
        units = units + (tl.minimum(tl.maximum(unit, -1.0), 1.0),)
    codes = most * 0.0
    along, square, worth = codes, codes + 1.0, codes - 1.0
    # A loop, as five copies of it take several times as long to compile.
    for i in range(step_count(BITS)):
        others = tl.div_rn(most * 0.0 + 10.0 * HALF, most * 0.0 + (first_tenths(BITS) + i))
        other, its = _along(units, inside, others, AXIS, BITS)
        its_worth = other * other * (1.0 - EACH_LESS * i) / its
        better = its_worth > worth
        codes = tl.where(better, others, codes)
        along = tl.where(better, other, along)
        square = tl.where(better, its, square)
        worth = tl.where(better, its_worth, worth)
    own = units[0] * units[0]
    for j in tl.static_range(1, len(units)):
        own += units[j] * units[j]
    length = tl.sum(own, AXIS, keep_dims=True)
    scale = most * (tl.sqrt(length / square) if NORM else length / tl.maximum(along, TINY))
    return units, codes, tl.minimum(tl.maximum(scale, TINY), HUGE).to(tl.float16)


@triton.jit
def _packed(units, codes, BITS: tl.constexpr):
    """Bytes of the elements, and apart from them, in bits 0 to 3, the high bits of codes of 3 bits."""
    PER: tl.constexpr = per_byte(BITS)
    found = (units[0] * 0.0).to(tl.int32)
    high = found
    for j in tl.static_range(PER):
        code = (level_of(units[j], codes, levels(BITS)) + (levels(BITS) - 0.5)).to(tl.int32)
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
    units, reach, scale = _rounded(parts, inside, 0, BITS, norm_kept(CODEC))
    tl.store(scales + G + tl.arange(0, 1), scale)
    packed, high = _packed(units, reach, BITS)
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
    units, reach, scale = _rounded(parts, inside[None, :], 1, BITS, norm_kept(CODEC))
    tl.store(scales + (slot * group_count(CODEC, D) + G)[:, None], scale, mask=valid[:, None])
    packed, high = _packed(units, reach, BITS)
    row = codes + slot[:, None] * row_bytes(CODEC, D) + byte_of(CODEC, D, G)
    tl.store(row + i[None, :], packed.to(tl.uint8), mask=valid[:, None] & inside[None, :])
    if BITS == 3:
        COUNT: tl.constexpr = size_of(CODEC, D, G) // 8
        HALF: tl.constexpr = i.shape[0] // 2
        k = tl.arange(0, HALF)
        both = tl.sum(tl.reshape(high << (i // COUNT * 4)[None, :], [N, 2, HALF]), 1)
        tl.store(row + 2 * COUNT + k[None, :], both.to(tl.uint8), mask=valid[:, None] & (k < COUNT)[None, :])
