"""Codes and scales in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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


@triton.jit
def numbers(codes, DTYPE: tl.constexpr):
    """Codes as floats; in half precision by setting the bits of 1024 + code, which is cheaper than any conversion."""
    if DTYPE == tl.float16:
        return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
    return codes.to(DTYPE)


@triton.jit
def group_bytes(codes, slot, valid, group, COUNT: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr):
    """Bytes [slots, PADDED] of one group of `COUNT` bytes of the slots."""
    d = tl.arange(0, PADDED)
    mask = valid[:, None] & (d < COUNT)[None, :]
    return tl.load(codes + slot[:, None] * STRIDE + group * COUNT + d[None, :], mask=mask, other=0)
