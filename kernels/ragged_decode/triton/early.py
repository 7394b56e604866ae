"""What a program will read first, on its way while it waits for the launch before it."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcompile.kernels.codecs.integers.triton.split import group_count, row_bytes
from kvcompile.kernels.overlap import fetch


@triton.constexpr_function
def slot_bytes(codec, head_dim, exact_bits):
    """Bytes of a slot on one side, its codes and scales or its vector."""
    return row_bytes(codec, head_dim) + 2 * group_count(codec, head_dim) if codec else head_dim * exact_bits // 8


@triton.jit
def affordable(size, exact, KC: tl.constexpr, VC: tl.constexpr, D: tl.constexpr):
    """How many slots `size` bytes are."""
    BITS: tl.constexpr = exact.dtype.element_ty.primitive_bitwidth
    return size // (slot_bytes(KC, D, BITS) + slot_bytes(VC, D, BITS))


@triton.jit
def begin(exact, codes, scales, start, count, CODEC: tl.constexpr, D: tl.constexpr):
    """Fetch `count` slots from slot `start` on; pointers are those of the head in this sequence."""
    if CODEC == 0:
        BITS: tl.constexpr = exact.dtype.element_ty.primitive_bitwidth
        fetch(exact + start * D, count * slot_bytes(CODEC, D, BITS))
    else:
        CODE_BYTES: tl.constexpr = row_bytes(CODEC, D)
        GROUPS: tl.constexpr = group_count(CODEC, D)
        fetch(codes + start * CODE_BYTES, count * CODE_BYTES)
        fetch(scales + start * GROUPS, count * GROUPS * 2)
