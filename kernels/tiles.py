"""Loads, products and addresses that the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b):
    """A product on tensor cores; of float32 in three parts, which have its precision."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def columns(base, rows, used, STEP: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr):
    """Every `STEP`-th of the elements at `base`, `COUNT` of them, of rows of D elements: f32 [PADDED, rows]."""
    d = tl.arange(0, PADDED)
    mask = (d < COUNT)[:, None] & (rows < used)[None, :]
    return tl.load(base + rows[None, :] * D + d[:, None] * STEP, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def transformed(prompt, token, valid, matrix, mean, e, needed, D: tl.constexpr, N: tl.constexpr,
                TRANSFORMED: tl.constexpr):  # fmt: skip
    """Elements `e`, as far as `needed`, of y = T (x - mean) for the tokens' vectors x (of x itself where nothing is
    TRANSFORMED): f32 [slots, elements]."""
    if TRANSFORMED:
        total = tl.zeros([N, e.shape[0]], tl.float32)
        for start in range(0, D, 32):
            d = start + tl.arange(0, 32)
            inside = valid[:, None] & (d < D)[None, :]
            x = tl.load(prompt + token[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - tl.load(mean + d, mask=d < D, other=0.0)[None, :], 0.0)
            rows = needed[None, :] & (d < D)[:, None]
            part = tl.load(matrix + e[None, :] * D + d[:, None], mask=rows, other=0.0)
            total += tl.dot(x, part, input_precision="tf32x3")  # three products that give float32's precision
        return total
    mask = valid[:, None] & needed[None, :]
    return tl.load(prompt + token[:, None] * D + e[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def of_head(b, exact, codes, scales, anchors, rows, codes_step, scales_step, anchored, row, first_code, first_scale,
            anchor, D: tl.constexpr, U, S):  # fmt: skip
    """Where the vectors of a head, its codes and scales, and its copy of token 0 begin for sequence b of the store, by
    what `head_table` says of it; U and S are the `units` of codes and scales on this side."""
    return (
        exact + (b * rows + row) * D, codes + (b * codes_step + first_code) * U,
        scales + (b * scales_step + first_scale) * S, anchors + (b * anchored + anchor) * D,
    )  # fmt: skip
