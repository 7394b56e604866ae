"""How the Triton kernels divide a vector of a codec: numbers that they are compiled with, by the codec's id.

Groups are those of `Codec.split`. `ragged_decode` reads codes in units of 16 bits, a tile of them at a time: one
group's, or two groups' that are alike, whose units are few (products have 16 units or more).
"""

from __future__ import annotations

import triton

from kvcompile.kernels.codecs import CODECS
from kvcompile.kernels.codecs.base import EIGHTHS, split
from kvcompile.kernels.codecs.integers import keeps_norm

LEAST = 16
"""Units of a tile."""
WIDE, MOST = 2 * LEAST, 128
"""Units of a tile of two groups up to this head size, beyond which registers do not suffice: 4 bits are then read 64
bytes at a time. Groups that are read apart touch every line of memory twice, which keeps the second-level cache of an
H200 busier than its memory."""

SECTIONS = {
    id: (codec.sections or ((codec.bits, EIGHTHS),), codec.group) for id, codec in CODECS.items() if codec.has("triton")
}
"""By id, what `split` wants: a part of what Triton knows kernels by, so that none is used for another division."""

_split = triton.constexpr_function(split)
_keeps_norm = triton.constexpr_function(keeps_norm)


@triton.constexpr_function
def groups_of(codec, head_dim):
    """The groups of a vector."""
    return _split(SECTIONS[codec][0], SECTIONS[codec][1], head_dim)


@triton.constexpr_function
def group_count(codec, head_dim):
    """Groups of a vector."""
    return len(groups_of(codec, head_dim))


@triton.constexpr_function
def bits_of(codec, head_dim, group):
    """Bits of a group's codes."""
    return groups_of(codec, head_dim)[group].bits


@triton.constexpr_function
def start_of(codec, head_dim, group):
    """The first element of a group."""
    return groups_of(codec, head_dim)[group].start


@triton.constexpr_function
def size_of(codec, head_dim, group):
    """Elements of a group."""
    return groups_of(codec, head_dim)[group].size


@triton.constexpr_function
def byte_of(codec, head_dim, group):
    """The first byte of a group."""
    return groups_of(codec, head_dim)[group].byte


@triton.constexpr_function
def row_bytes(codec, head_dim):
    """Bytes of a vector's codes."""
    return sum(group.size * group.bits // 8 for group in groups_of(codec, head_dim))


@triton.constexpr_function
def stored_elements(codec, head_dim):
    """Elements of a vector that are stored; the others are the last ones, and 0."""
    return sum(group.size for group in groups_of(codec, head_dim))


@triton.constexpr_function
def norm_kept(codec):
    """Whether what is read has the norm of what was stored."""
    return _keeps_norm(SECTIONS[codec][0])


@triton.constexpr_function
def padded(count, least=1):
    """The next power of two."""
    return max(least, triton.next_power_of_2(count))


@triton.constexpr_function
def per_unit(bits):
    """Codes of a unit; of 3 bits, those whose low two are in it."""
    return 8 if bits == 3 else 16 // bits


@triton.constexpr_function
def group_units(codec, head_dim, group):
    """Units of a group; of 3 bits, those of the low two."""
    bits, size = bits_of(codec, head_dim, group), size_of(codec, head_dim, group)
    return size // 8 if bits == 3 else size * bits // 16


@triton.constexpr_function
def part_at(codec, head_dim, group):
    """Where the parts of a query for a group begin: there is one for every code of a unit."""
    return sum(8 if g.bits == 3 else 16 // g.bits for g in groups_of(codec, head_dim)[:group])


@triton.constexpr_function
def tile_count(codec, head_dim):
    """Tiles of a vector."""
    return len(_tiles(codec, head_dim))


@triton.constexpr_function
def tile_first(codec, head_dim, tile):
    """The first group of a tile."""
    return _tiles(codec, head_dim)[tile][0]


@triton.constexpr_function
def tile_groups(codec, head_dim, tile):
    """Groups of a tile."""
    return _tiles(codec, head_dim)[tile][1]


@triton.constexpr_function
def tile_at(codec, head_dim, tile):
    """Where the accumulators of a tile begin among those of a vector: a tile for every code of a unit, and one more for
    every group."""
    found = 0
    for first, count in _tiles(codec, head_dim)[:tile]:
        bits = groups_of(codec, head_dim)[first].bits
        found += (8 if bits == 3 else 16 // bits) + count
    return found


@triton.constexpr_function
def _tiles(codec, head_dim):
    """The first group of every tile, and how many it has."""
    groups, found, first = groups_of(codec, head_dim), [], 0
    while first < len(groups):
        alike = [g for g in groups[first : first + 2] if (g.bits, g.size) == (groups[first].bits, groups[first].size)]
        together = 2 * group_units(codec, head_dim, first)
        count = len(alike) if together == LEAST or (together == WIDE and head_dim <= MOST) else 1
        found.append((first, count))
        first += count
    return found
