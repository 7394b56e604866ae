"""Codes as the tiles of floats that products need, in Triton: one tile for every code of a unit of 16 bits.

In half precision, bits of a code are set in the mantissa of a power of two at which a step of them is 1, so that two
neighbours take one instruction; `offset` says what is then to be taken off. No number is rounded.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1")
"""The interpreter has no inline assembly."""


@triton.jit
def spread(unit, high, upper, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The codes of units. Of 3 bits, `high` has the high ones, in bits 0 to 3 those of the unit's low byte, and in bits
    8 to 11 those of its high one, or `upper` has them, four bits further up; the other one is 0."""
    if DTYPE != tl.float16:
        tiles = _numbers(unit, high, upper, BITS, DTYPE)
    elif BITS == 8:
        tiles = _spread8(unit)
    elif BITS == 4:
        tiles = _spread4(unit)
    elif BITS == 3:
        tiles = _spread3(unit, high, upper)
    else:
        tiles = _spread2(unit)
    return tiles


@triton.jit
def _numbers(unit, high, upper, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Plain numbers of any type."""
    tiles = ()
    if BITS == 3:
        high = high | upper >> 4
        for j in tl.static_range(8):
            code = unit >> 2 * j & 3 | (high >> j % 4 + 8 * (j // 4) & 1) << 2
            tiles = tiles + (code.to(DTYPE),)
    else:
        for j in tl.static_range(16 // BITS):
            tiles = tiles + ((unit >> BITS * j & (1 << BITS) - 1).to(DTYPE),)
    return tiles


@triton.jit
def _set(unit, MASK: tl.constexpr, NUMBER: tl.constexpr):
    """Bits of a unit set in a number; in the interpreter alone."""
    return (unit & MASK | NUMBER).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _spread8(unit):
    if COMPILED:
        # prmt picks bytes: code, 0x64, code, 0x64.
        tiles = tl.inline_asm_elementwise(
            """prmt.b32 $0, $2, 0x64646464, 0x4240;
            prmt.b32 $1, $2, 0x64646464, 0x4341;""",
            "=&r,=&r,r", [unit], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        tiles = (_set(unit, 0x00FF, 0x6400), _set(unit >> 8, 0x00FF, 0x6400))
    return tiles


@triton.jit
def _spread4(unit):
    if COMPILED:
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
            _set(unit, 0x000F, 0x6400), _set(unit, 0x00F0, 0x5400),
            _set(unit >> 8, 0x000F, 0x6400), _set(unit >> 8, 0x00F0, 0x5400),
        )  # fmt: skip
    return tiles


@triton.jit
def _spread2(unit):
    if COMPILED:
        tiles = tl.inline_asm_elementwise(
            """{ .reg .b32 high;
            shr.b32 high, $8, 8;
            lop3.b32 $0, $8, 0x00030003, 0x64006400, 0xea;
            lop3.b32 $1, $8, 0x000c000c, 0x5c005c00, 0xea;
            lop3.b32 $2, $8, 0x00300030, 0x54005400, 0xea;
            lop3.b32 $3, $8, 0x00c000c0, 0x4c004c00, 0xea;
            lop3.b32 $4, high, 0x00030003, 0x64006400, 0xea;
            lop3.b32 $5, high, 0x000c000c, 0x5c005c00, 0xea;
            lop3.b32 $6, high, 0x00300030, 0x54005400, 0xea;
            lop3.b32 $7, high, 0x00c000c0, 0x4c004c00, 0xea; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [unit],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        tiles = ()
        for i in tl.static_range(2):
            byte = unit >> 8 * i
            tiles = tiles + (
                _set(byte, 0x0003, 0x6400), _set(byte, 0x000C, 0x5C00), _set(byte, 0x0030, 0x5400),
                _set(byte, 0x00C0, 0x4C00),
            )  # fmt: skip
    return tiles


@triton.jit
def _spread3(unit, high, upper):
    """Codes of 2 bits, each with its high bit beside them."""
    if COMPILED:
        # Table 0xf8 of lop3 is a | (b & c).
        tiles = tl.inline_asm_elementwise(
            """{ .reg .b32 low, h, t;
            shr.b32 t, $10, 4;
            lop3.b32 h, $9, t, 0x0f0f0f0f, 0xf8;
            shr.b32 low, $8, 8;
            lop3.b32 $0, $8, 0x00030003, 0x64006400, 0xea;
            shl.b32 t, h, 2;
            lop3.b32 $0, t, 0x00040004, $0, 0xea;
            lop3.b32 $1, $8, 0x000c000c, 0x5c005c00, 0xea;
            shl.b32 t, h, 3;
            lop3.b32 $1, t, 0x00100010, $1, 0xea;
            lop3.b32 $2, $8, 0x00300030, 0x54005400, 0xea;
            shl.b32 t, h, 4;
            lop3.b32 $2, t, 0x00400040, $2, 0xea;
            lop3.b32 $3, $8, 0x00c000c0, 0x4c004c00, 0xea;
            shl.b32 t, h, 5;
            lop3.b32 $3, t, 0x01000100, $3, 0xea;
            lop3.b32 $4, low, 0x00030003, 0x64006400, 0xea;
            shr.b32 t, h, 6;
            lop3.b32 $4, t, 0x00040004, $4, 0xea;
            lop3.b32 $5, low, 0x000c000c, 0x5c005c00, 0xea;
            shr.b32 t, h, 5;
            lop3.b32 $5, t, 0x00100010, $5, 0xea;
            lop3.b32 $6, low, 0x00300030, 0x54005400, 0xea;
            shr.b32 t, h, 4;
            lop3.b32 $6, t, 0x00400040, $6, 0xea;
            lop3.b32 $7, low, 0x00c000c0, 0x4c004c00, 0xea;
            shr.b32 t, h, 3;
            lop3.b32 $7, t, 0x01000100, $7, 0xea; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r", [unit, high, upper],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        tiles = ()
        for i in tl.static_range(2):
            byte, more = unit >> 8 * i, (high | upper >> 4) >> 8 * i
            tiles = tiles + (
                _set(byte & 0x0003 | more << 2 & 0x0004, 0x0007, 0x6400),
                _set(byte & 0x000C | more << 3 & 0x0010, 0x001C, 0x5C00),
                _set(byte & 0x0030 | more << 4 & 0x0040, 0x0070, 0x5400),
                _set(byte & 0x00C0 | more << 5 & 0x0100, 0x01C0, 0x4C00),
            )  # fmt: skip
    return tiles


@triton.constexpr_function
def offset(bits, part, dtype):
    """What tile `part` of `spread` lies above the numbers that its codes stand for, in steps."""
    half = {8: (1024,), 4: (1024, 64), 3: (1024, 256, 64, 16), 2: (1024, 256, 64, 16)}[bits]
    return centre(bits) + (half[part % len(half)] if dtype == tl.float16 else 0)


@triton.constexpr_function
def centre(bits):
    """The mean of all codes, of which the numbers that they stand for lie on either side."""
    return 2 ** (bits - 1) - 0.5
