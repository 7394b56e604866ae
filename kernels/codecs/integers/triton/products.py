"""Products of codes with queries and weights in Triton, for `ragged_decode`: any codec of whole numbers, by its groups.

Codes stay integers; scales and offsets are applied to what the products give. Tiles are those of `split`, and what code
j of a unit stands for is in a tile of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.integers.triton.loading import group_scales, tile_of
from kvcompile.kernels.codecs.integers.triton.split import (
    bits_of,
    group_count,
    group_units,
    padded,
    part_at,
    per_unit,
    size_of,
    start_of,
    stored_elements,
    tile_at,
    tile_count,
    tile_first,
    tile_groups,
)  # fmt: skip
from kvcompile.kernels.codecs.integers.triton.spread import centre, offset
from kvcompile.kernels.tiles import product


@triton.jit
def asked(query, rows, used, CODEC: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """The queries as their products with tiles of codes need them, by group and code of a unit [units, rows], 0 for
    units of other groups; and by group what the products lie too high, [rows]: of codes as c + o_j, the sum of q o_j.
    """
    parts = ()
    sums = ()
    for tile in tl.static_range(tile_count(CODEC, D)):
        for k in tl.static_range(tile_groups(CODEC, D, tile)):
            more, high = _asked(query, rows, used, tile, k, CODEC, D, DTYPE)
            parts = parts + more
            sums = sums + (high,)
    return parts, sums


@triton.jit
def _asked(query, rows, used, TILE: tl.constexpr, K: tl.constexpr, CODEC: tl.constexpr, D: tl.constexpr,
           DTYPE: tl.constexpr):  # fmt: skip
    """Those of group K of a tile."""
    G: tl.constexpr = tile_first(CODEC, D, TILE) + K
    UNITS: tl.constexpr = group_units(CODEC, D, G)
    BITS: tl.constexpr = bits_of(CODEC, D, G)
    PER: tl.constexpr = per_unit(BITS)
    START: tl.constexpr = start_of(CODEC, D, G)
    COUNT: tl.constexpr = padded(UNITS * tile_groups(CODEC, D, TILE), 16)
    d = tl.arange(0, COUNT) - K * UNITS
    mask = ((d >= 0) & (d < UNITS))[:, None] & (rows < used)[None, :]
    TOGETHER: tl.constexpr = PER <= 4 and D % PER == 0 and query.dtype.element_ty.primitive_bitwidth == 16
    if TOGETHER:
        # All of a unit's elements in one load: four short ones would take as long as a block of slots.
        at = query.to(tl.pointer_type(tl.int64 if PER == 4 else tl.int32)) + START // PER
        words = tl.load(at + rows[None, :] * (D // PER) + d[:, None], mask=mask, other=0)
    parts = ()
    for j in tl.static_range(PER):
        if TOGETHER:
            part = (words >> 16 * j).to(tl.int16).to(query.dtype.element_ty, bitcast=True)
        else:
            part = tl.load(query + START + j + rows[None, :] * D + d[:, None] * PER, mask=mask, other=0.0)
        part = part.to(tl.float32).to(DTYPE)
        parts = parts + (part,)
        # Products with constants leave the sums where those with codes will need them. An offset is not a number of
        # half precision, but what it consists of is.
        for i in tl.static_range(2 if DTYPE == tl.float16 else 1):
            own = tl.full([16, COUNT], offset(BITS, j, DTYPE) - centre(BITS) if i == 1 else centre(BITS), DTYPE)
            if i + j == 0:
                high = product(own, part)
            else:
                high = tl.dot(own, part, high, input_precision="tf32x3")
    high = tl.max(high, 0)
    return parts, high


@triton.jit
def logits(parts, sums, codes, scales, slot, valid, scale, CODEC: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
           DTYPE: tl.constexpr):  # fmt: skip
    """Products f32 [slots, rows] of the keys of the slots with the queries, times `scale`, summed over groups:
    (sum of q (c + o_j) - sum of q o_j) s."""
    by_group = group_scales(scales, slot, valid, group_count(CODEC, D), S)
    for tile in tl.static_range(tile_count(CODEC, D)):
        tiles = tile_of(codes, slot, valid, tile, CODEC, D, False, DTYPE)
        for k in tl.static_range(tile_groups(CODEC, D, tile)):
            one = _product(tiles, parts, part_at(CODEC, D, tile_first(CODEC, D, tile) + k))
            one = one - sums[tile_first(CODEC, D, tile) + k][None, :]
            one = one * (by_group[tile_first(CODEC, D, tile) + k] * scale)[:, None]
            if tile + k == 0:
                total = one
            else:
                total += one
    return total


@triton.jit
def _product(tiles, parts, AT: tl.constexpr):
    """The sum of the products of all tiles, with the parts from `AT` on."""
    one = product(tiles[0], parts[AT])
    for j in tl.static_range(1, len(tiles)):
        one = tl.dot(tiles[j], parts[AT + j], one, input_precision="tf32x3")
    return one


@triton.jit
def mixed(acc, alpha, weights, codes, scales, slots, valid, CODEC: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
          DTYPE: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """`acc` times `alpha` plus the sums of w s (c + o_j), and of w s, over all blocks of slots."""
    by_group = ()
    for half in tl.static_range(len(slots)):
        by_group = by_group + (group_scales(scales, slots[half], valid[half], group_count(CODEC, D), S),)
    new = ()
    for tile in tl.static_range(tile_count(CODEC, D)):
        found = _mixed(weights, codes, by_group, slots, valid, tile, CODEC, D, DTYPE, N)
        # Not summed up in the products: tensor cores cut off where they add, and a long sum would drift.
        for j in tl.static_range(len(found)):
            new = new + (acc[tile_at(CODEC, D, tile) + j] * alpha[None, :] + found[j],)
    if stored_elements(CODEC, D) < D:
        new = new + (acc[len(acc) - 1] * alpha[None, :],)
    return new


@triton.jit
def _mixed(weights, codes, by_group, slots, valid, TILE: tl.constexpr, CODEC: tl.constexpr, D: tl.constexpr,
           DTYPE: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """What a tile adds to its accumulators."""
    G: tl.constexpr = tile_first(CODEC, D, TILE)
    COUNT: tl.constexpr = tile_groups(CODEC, D, TILE)
    UNITS: tl.constexpr = group_units(CODEC, D, G)
    EACH: tl.constexpr = per_unit(bits_of(CODEC, D, G)) + 1
    found = ()
    for half in tl.static_range(len(slots)):
        tiles = tile_of(codes, slots[half], valid[half], TILE, CODEC, D, True, DTYPE) + (first_row(N, DTYPE),)
        more = ()
        for k in tl.static_range(COUNT):
            scaled = (weights[half] * by_group[half][G + k][:, None]).to(DTYPE)
            for j in tl.static_range(EACH):
                if half == 0:
                    more = more + (product(tiles[j], scaled),)
                else:
                    more = more + (tl.dot(tiles[j], scaled, found[k * EACH + j], input_precision="tf32x3"),)
        found = more
    if COUNT == 2:
        first = (tl.arange(0, 2 * UNITS) < UNITS)[:, None]
        merged = ()
        for j in tl.static_range(EACH - 1):
            merged = merged + (tl.where(first, found[j], found[EACH + j]),)
        found = merged + (found[EACH - 1], found[2 * EACH - 1])
    return found


@triton.jit
def _elements(CODEC: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """The element that code 0 of every unit of a tile stands for, and whether there is such a unit."""
    G: tl.constexpr = tile_first(CODEC, D, TILE)
    UNITS: tl.constexpr = group_units(CODEC, D, G)
    COUNT: tl.constexpr = tile_groups(CODEC, D, TILE)
    d = tl.arange(0, padded(UNITS * COUNT, 16))
    # Neighbouring groups' elements follow each other, as their units do.
    return start_of(CODEC, D, G) + d * per_unit(bits_of(CODEC, D, G)), d < UNITS * COUNT


@triton.jit
def _rest(CODEC: tl.constexpr, D: tl.constexpr):
    """Elements that are not stored."""
    return stored_elements(CODEC, D) + tl.arange(0, padded(D - stored_elements(CODEC, D), 16))


@triton.jit
def _spread_out(value, e, inside, R: tl.constexpr):
    """Elements `e` of the vector at `value` for every row."""
    one = tl.load(value + e, mask=inside, other=0.0).to(tl.float32)
    return one[:, None] + tl.zeros([1, R], tl.float32)


@triton.jit
def start(value, taken, CODEC: tl.constexpr, D: tl.constexpr, R: tl.constexpr):
    """The accumulators by tile: one [units, rows] for every code of a unit, of the vector at `value` where it is
    `taken`, else 0, and one [16, rows] a group that sums weights times scales. At last, elements that are not stored,
    of which that vector alone has other numbers than 0."""
    new = ()
    for tile in tl.static_range(tile_count(CODEC, D)):
        e, inside = _elements(CODEC, D, tile)
        for j in tl.static_range(per_unit(bits_of(CODEC, D, tile_first(CODEC, D, tile)))):
            new = new + (_spread_out(value, e + j, inside & taken, R),)
        for _ in tl.static_range(tile_groups(CODEC, D, tile)):
            new = new + (tl.zeros([16, R], tl.float32),)
    if stored_elements(CODEC, D) < D:
        e = _rest(CODEC, D)
        new = new + (_spread_out(value, e, (e < D) & taken, R),)
    return new


@triton.jit
def first_row(N: tl.constexpr, DTYPE: tl.constexpr):
    """Ones in the first row, else zeros [16, N]: a product with it sums columns as products with codes do."""
    return (tl.arange(0, 16)[:, None] + tl.zeros([16, N], tl.int32) == 0).to(DTYPE)


@triton.jit
def keep(acc, inverse, out, rows, used, CODEC: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """Store the accumulators, times the `inverse` of a row's sum of weights, as rows of D elements:
    sum(w s (c + o_j)) - o_j sum(w s)."""
    for tile in tl.static_range(tile_count(CODEC, D)):
        _keep(acc, inverse, out, rows, used, tile, CODEC, D, DTYPE)
    if stored_elements(CODEC, D) < D:
        e = _rest(CODEC, D)
        tl.store(out + rows[None, :] * D + e[:, None], acc[len(acc) - 1] * inverse[None, :],
                 mask=(e < D)[:, None] & (rows < used)[None, :])  # fmt: skip


@triton.jit
def _keep(acc, inverse, out, rows, used, TILE: tl.constexpr, CODEC: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    G: tl.constexpr = tile_first(CODEC, D, TILE)
    BITS: tl.constexpr = bits_of(CODEC, D, G)
    PER: tl.constexpr = per_unit(BITS)
    AT: tl.constexpr = tile_at(CODEC, D, TILE)
    e, inside = _elements(CODEC, D, TILE)
    total = tl.sum(acc[AT + PER], 0)[None, :]
    if tile_groups(CODEC, D, TILE) == 2:
        first = (e < start_of(CODEC, D, G) + size_of(CODEC, D, G))[:, None]
        total = tl.where(first, total, tl.sum(acc[AT + PER + 1], 0)[None, :])
    for j in tl.static_range(PER):
        kept = (acc[AT + j] - offset(BITS, j, DTYPE) * total) * inverse[None, :]
        tl.store(out + rows[None, :] * D + e[:, None] + j, kept, mask=inside[:, None] & (rows < used)[None, :])
