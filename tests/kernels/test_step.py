"""What a decode step needs beside attention, Triton against torch: compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import copy

import pytest
import torch
from device_stores import spread_over

from kvcompile.kernels import Buffers, HeadSpec, LayerLayout, Transform
from kvcompile.kernels.add_norm import dense as add_norm_dense
from kvcompile.kernels.new_token import dense as new_token_dense
from kvcompile.kernels.new_token.parts import HeadNorms, LinearScorer
from kvcompile.kernels.silu_mul import dense as silu_mul_dense

pytest.importorskip("triton")
from kvcompile.kernels.add_norm import triton as add_norm_kernel
from kvcompile.kernels.append import reference as append_reference
from kvcompile.kernels.append import triton as append_kernel
from kvcompile.kernels.new_token import triton as new_token_kernel
from kvcompile.kernels.restore import triton as restore_kernel
from kvcompile.kernels.silu_mul import triton as silu_mul_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {torch.float32: 2e-5, torch.float16: 2e-3} | ({torch.bfloat16: 2e-2} if torch.cuda.is_available() else {})
EXACT = LayerLayout.from_heads([HeadSpec("recent", 7, 2, 3), HeadSpec("full", 20, 4, 5)])
MIXED = LayerLayout.from_heads(
    [HeadSpec("scored", 9, 2, 3, 8, 4), HeadSpec("recent", 7, 1, 3, 16, 8), HeadSpec("scored", 12, 0, 4, 4, 16)]
)
FEW_BITS = LayerLayout.from_heads(
    [
        HeadSpec("scored", 9, 2, 3, 67, 3), HeadSpec("recent", 7, 1, 3, 66, 2), HeadSpec("scored", 12, 0, 4, 65, 3),
        HeadSpec("scored", 11, 1, 4, 4, 66),
    ]
)  # fmt: skip
STORED = {"exact": EXACT, "quantised": MIXED, "few bits": FEW_BITS}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def transform_of(layout: LayerLayout, head_dim: int) -> Transform:
    """Identity for heads that are not quantised, as the runtime has it."""
    parts = []
    for name in ("k_bits", "v_bits"):
        plain = torch.tensor([getattr(c, name) == 16 for c in layout.classes for _ in range(c.count)])
        matrix = torch.eye(head_dim) + 0.1 * draw(layout.num_kv_heads, head_dim, head_dim, seed=len(name))
        mean = draw(layout.num_kv_heads, head_dim, seed=1)
        matrix[plain], mean[plain] = torch.eye(head_dim), 0
        parts += [matrix, torch.linalg.inv(matrix), mean]
    return Transform(*parts).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "size"), [(1, 16), (3, 576), (2, 37)])
@pytest.mark.parametrize("added", [True, False])
def test_add_norm(dtype: torch.dtype, batch: int, size: int, added: bool) -> None:
    residual, delta, weight = (
        draw(*s, seed=i).to(DEVICE, dtype) for i, s in enumerate([(batch, size)] * 2 + [(size,)])
    )
    ours = add_norm_kernel.add_norm(residual, delta if added else None, weight, 1e-5)
    theirs = add_norm_dense.add_norm(residual, delta if added else None, weight, 1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=DTYPES[dtype], rtol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "size"), [(1, 16), (3, 1500)])
def test_silu_mul(dtype: torch.dtype, batch: int, size: int) -> None:
    both = draw(batch, 2 * size).to(DEVICE, dtype) * 3
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(
        silu_mul_kernel.silu_mul(both), silu_mul_dense.silu_mul(both), atol=tolerance, rtol=tolerance
    )


def one_step_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Bytes of codes, of 8 bits or twice 4: a bfloat16 that is rounded once more or less often is another code."""
    a, b = a.int(), b.int()
    return ((a >> 4) - (b >> 4)).abs().le(1) & ((a & 15) - (b & 15)).abs().le(1) | (a - b).abs().le(1)


@pytest.mark.parametrize(
    ("name", "normed", "shape", "dtype"),
    spread_over(STORED, [False, True], [(1, 16, 1), (5, 64, 3), (7, 96, 1), (8, 128, 1)], DTYPES), ids=str,
)  # fmt: skip
def test_new_token(name: str, normed: bool, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Queries and stores after some tokens of a longer text, more of it than the heads hold."""
    layout, (group, head_dim, batch) = STORED[name], shape
    heads, d = layout.num_kv_heads, 40
    transform = None if layout is EXACT else transform_of(layout, head_dim)
    norms = HeadNorms(*(draw(head_dim, seed=i).to(DEVICE, dtype) for i in (1, 2)), 1e-5) if normed else None
    scorer = None if layout is EXACT else LinearScorer(draw(heads, d).to(DEVICE), draw(heads).to(DEVICE))
    stores = []
    for name in ("k_bits", "v_bits"):
        stored = [getattr(c, name) if getattr(c, name) != 16 else dtype.itemsize * 8 for c in layout.classes]
        stores.append(Buffers(layout, stored, head_dim, dtype, DEVICE, batch))
    scores = torch.zeros(batch, layout.scored_slots, dtype=torch.float16, device=DEVICE)
    others, other_scores = copy.deepcopy(stores), scores.clone()
    for step in (0, 1, 7, 8, 9, 12, 13, 20):
        seen = [max(0, step - b) for b in range(batch)]
        qkv = draw(batch, heads * (group + 2) * head_dim, seed=step).to(DEVICE, dtype)
        angle = draw(batch, head_dim // 2, seed=step).repeat(1, 2).to(DEVICE)
        rotary = angle.cos().to(dtype), angle.sin().to(dtype)
        hidden = draw(batch, d, seed=step).to(DEVICE, dtype)
        rest = (transform, norms, hidden, scorer)
        ours = new_token_kernel.new_token(qkv, *rotary, *stores, scores, layout, seen, *rest)
        theirs = new_token_dense.new_token(qkv, *rotary, *others, other_scores, layout, seen, *rest)
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, atol=DTYPES[dtype] * scale, rtol=DTYPES[dtype])
    torch.testing.assert_close(scores, other_scores, atol=2e-2, rtol=1e-2)
    for one, two in zip(stores, others, strict=True):
        # A key that was rotated in another precision may round to the other side of a code's edge.
        for a, b in zip(one.tensors(), two.tensors(), strict=True):
            close = (a.float() - b.float()).abs() <= 1e-2 + 1e-2 * b.float().abs()
            if a.dtype == torch.uint8:
                close = (one_step_apart if dtype == torch.bfloat16 else torch.eq)(a, b)
            assert close.float().mean() > 0.97


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim", "batch"), [(1, 16, 1), (5, 96, 3), (7, 128, 2)])
def test_restore(group: int, head_dim: int, batch: int, dtype: torch.dtype) -> None:
    transform = transform_of(MIXED, head_dim)
    output = draw(batch, MIXED.num_kv_heads * group, 1, head_dim).to(DEVICE, dtype)
    tolerance = DTYPES[dtype] * 5
    torch.testing.assert_close(
        restore_kernel.restore(output, transform, MIXED), transform.outputs(output), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_victim_among_many_scores(seed: int) -> None:
    """Several blocks of scores, with many equal ones, and heads that begin and end inside of a block."""
    layout = LayerLayout.from_heads([HeadSpec("scored", n, 3, r) for n, r in ((2600, 30), (1024, 5), (1100, 1))])
    generator = torch.Generator().manual_seed(seed)
    stores = [Buffers(layout, [32] * 3, 2, torch.float32, DEVICE, 2) for _ in range(2)]
    scores = torch.randint(0, 40, (2, layout.scored_slots), generator=generator).half()
    others, other_scores = [copy.deepcopy(s) for s in stores], scores.clone()
    for stored in others:
        stored.exact = stored.exact.cpu()
    scores = scores.to(DEVICE)
    for step in range(3):
        seen = [3000 + step, 2600 + step]
        new = torch.randn(2, 2, 3, 2, generator=generator)
        score = torch.randint(0, 60, (2, 3), generator=generator).float()
        append_kernel.append(*stores, scores, layout, *new.to(DEVICE), score.to(DEVICE), seen)
        append_reference.append(*others, other_scores, layout, *new, score, seen)
    assert torch.equal(scores.cpu(), other_scores)
    assert torch.equal(stores[0].exact.cpu(), others[0].exact)
