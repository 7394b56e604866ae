"""Loading codes and scales in Triton, for `ragged_decode`: any codec of whole numbers, by its groups."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.integers.triton.split import (
    bits_of,
    byte_of,
    group_units,
    padded,
    row_bytes,
    size_of,
    tile_first,
    tile_groups,
)
from kvcompile.kernels.codecs.integers.triton.spread import spread


@triton.jit
def tile_of(codes, slot, valid, TILE: tl.constexpr, CODEC: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr,
            DTYPE: tl.constexpr):  # fmt: skip
    """The codes of a tile in the slots, as `spread` gives them: [slots, units], or [units, slots] where units come
    `FIRST`."""
    G: tl.constexpr = tile_first(CODEC, D, TILE)
    BITS: tl.constexpr = bits_of(CODEC, D, G)
    UNITS: tl.constexpr = group_units(CODEC, D, G)
    COUNT: tl.constexpr = tile_groups(CODEC, D, TILE)
    STEP: tl.constexpr = size_of(CODEC, D, G) * BITS // 16
    d = tl.arange(0, padded(UNITS * COUNT, 16))
    at = codes.to(tl.pointer_type(tl.int16)) + byte_of(CODEC, D, G) // 2
    own = d if COUNT == 1 else d // UNITS * STEP + d % UNITS
    unit = _units(at, slot, valid, own, d < UNITS * COUNT, row_bytes(CODEC, D) // 2, FIRST)
    high = unit
    upper = unit
    if BITS == 3:
        # High bits of unit u are in unit u % (UNITS / 2) of the second part, those of the first half below the others.
        # Each half is loaded where it belongs, as a shift by a number of its own would cost a tile its layout.
        own += UNITS
        first = d % UNITS < UNITS // 2
        inside = d < UNITS * COUNT
        high = _units(at, slot, valid, own, inside & first, row_bytes(CODEC, D) // 2, FIRST)
        upper = _units(at, slot, valid, own - UNITS // 2, inside & (first == 0), row_bytes(CODEC, D) // 2, FIRST)
    return spread(unit, high, upper, BITS, DTYPE)


@triton.jit
def _units(at, slot, valid, own, inside, STRIDE: tl.constexpr, FIRST: tl.constexpr):
    """Units `own` of the slots, of which they have `STRIDE`."""
    if FIRST:
        unit = tl.load(at + slot[None, :] * STRIDE + own[:, None], mask=inside[:, None] & valid[None, :], other=0)
    else:
        unit = tl.load(at + slot[:, None] * STRIDE + own[None, :], mask=valid[:, None] & inside[None, :], other=0)
    return unit


@triton.jit
def group_scales(scales, slot, valid, G: tl.constexpr, S: tl.constexpr):
    """Scales of the slots by group, a tuple of f32 [slots]. Two or four groups come in one load where the place of a
    row (a multiple of `S` numbers) allows it, as loads of 16 bits cannot be asynchronous."""
    found = ()
    if G == 2 and S % 2 == 0:
        words = tl.load(scales.to(tl.pointer_type(tl.int32)) + slot, mask=valid, other=0)
        for g in tl.static_range(G):
            found = found + ((words >> 16 * g).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
    elif G == 4 and S % 4 == 0:
        words = tl.load(scales.to(tl.pointer_type(tl.int64)) + slot, mask=valid, other=0)
        for g in tl.static_range(G):
            found = found + ((words >> 16 * g).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
    else:
        for g in tl.static_range(G):
            found = found + (tl.load(scales + slot * G + g, mask=valid, other=0.0).to(tl.float32),)
    return found
