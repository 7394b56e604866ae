"""Stores whose sequences lie in the pages of an engine's pool, against stores of their own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kvcompile.kernels import HeadSpec, LayerLayout
from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.pages import ALIGN, PAGE_ALIGN, PageLayout
from kvcompile.runtime.store import LayerStore

LAYERS = [
    LayerLayout.from_heads([HeadSpec("full", 40, 4, 36), HeadSpec("recent", 9, 0, 8), HeadSpec("snapkv", 12, 2, 4)]),
    LayerLayout.from_heads(
        [HeadSpec("scored", 11, 1, 4, 8, 4), HeadSpec("recent", 17, 2, 15, 4, 8), HeadSpec("scored", 7, 2, 3, 16, 8)]
    ),
    LayerLayout.from_heads([HeadSpec("recent", 5, 0, 5)] * 3, window=5),
]
PLACES, PROMPTS, PAGES = [3, 1, 4], [30, 6, 1], 6


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def page_of(dtype: torch.dtype, head_dim: int) -> PageLayout:
    return PageLayout.of(LAYERS, head_dim, dtype)


@pytest.mark.parametrize("kernels", ["", "torch", "triton"])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 64), (torch.float16, 128), (torch.float32, 96)])
@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_steps_in_pages(
    monkeypatch: pytest.MonkeyPatch, kernels: str, dtype: torch.dtype, head_dim: int, layer: int
) -> None:
    """Three sequences in six pages: what they see is what each sees in a store of its own, and other pages stay."""
    if kernels == "triton" and torch.cuda.is_available():
        pytest.skip("CPU tensors, for Triton's interpreter")
    monkeypatch.setenv("KVCOMPILE_KERNELS", kernels)
    layout, heads = LAYERS[layer], 3
    pool = torch.full((PAGES, page_of(dtype, head_dim).nbytes), 77, dtype=torch.int8)
    paged = page_of(dtype, head_dim).store(layer, pool, None)
    alone = [LayerStore(layout, head_dim, dtype, torch.device("cpu"), 1) for _ in PLACES]
    for i, (place, n) in enumerate(zip(PLACES, PROMPTS, strict=True)):
        q = random(1, 2 * heads, n, head_dim, seed=i).to(dtype)
        k, v = (random(1, heads, n, head_dim, seed=10 * s + i).to(dtype) for s in (1, 2))
        score = random(1, n, heads, seed=30 + i) if layout.scored_slots else None
        for store in (paged.one(place, 0), alone[i]):
            prompt = LayerPrompt(layout, n, None)
            prompt.add(q, k, v, 0.1, score)
            store.cut(prompt)
    places, seen = torch.tensor(PLACES, dtype=torch.int32), torch.tensor(PROMPTS, dtype=torch.int32)
    for t in range(4 if kernels == "triton" else 12):  # the interpreter takes a second for each
        q = random(3, 2 * heads, 1, head_dim, seed=100 + t).to(dtype)
        k, v = (random(3, heads, 1, head_dim, seed=200 * s + t).to(dtype) for s in (1, 2))
        score = random(3, 1, heads, seed=300 + t) if layout.scored_slots else None
        flat = None if score is None else score[:, 0]
        out = paged.steps(q[:, :, 0], k[:, :, 0], v[:, :, 0], 0.1, flat, places, seen + t).unsqueeze(2)
        expected = [
            store.step(q[i : i + 1], k[i : i + 1], v[i : i + 1], 0.1, None if score is None else score[i : i + 1])
            for i, store in enumerate(alone)
        ]
        torch.testing.assert_close(out, torch.cat(expected), atol=2e-3 if dtype == torch.float16 else 2e-5, rtol=1e-3)
    assert (pool[[0, 2, 5]] == 77).all()


@pytest.mark.parametrize("layer", [0, 1])
def test_several_tokens_in_a_page(layer: int) -> None:
    """Are looked at and put there as in a store of its own."""
    layout = LAYERS[layer]
    page = page_of(torch.float32, 64)
    paged = page.store(layer, torch.zeros(PAGES, page.nbytes, dtype=torch.int8), None)
    alone = LayerStore(layout, 64, torch.float32, torch.device("cpu"), 1)
    q, k, v = random(1, 6, 20, 64, seed=1), random(1, 3, 20, 64, seed=2), random(1, 3, 20, 64, seed=3)
    score = random(1, 20, 3, seed=4) if layout.scored_slots else None
    for store in (paged.one(2, 0), alone):
        store.prefill(q, k, v, None, 0.1, score)
    more = [random(1, h, 9, 64, seed=5 + h) for h in (6, 3, 3)]
    score = random(1, 9, 3, seed=20) if layout.scored_slots else None
    torch.testing.assert_close(paged.one(2, 20).look(*more, 0.1), alone.look(*more, 0.1))
    for store in (paged.one(2, 20), alone):
        store.put(more[1], more[2], score)
    for mine, theirs in zip(paged.one(2, 29).tensors(), alone.tensors(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_page_is_the_sum_of_its_buffers(head_dim: int, dtype: torch.dtype) -> None:
    """Little more than what it holds; every buffer begins where loads of 16 bytes may, and goes on in whole rows."""
    page = page_of(dtype, head_dim)
    pool = torch.zeros(2, page.nbytes, dtype=torch.int8)
    held, buffers = 0, 0
    for layer in range(len(LAYERS)):
        store = page.store(layer, pool, None)
        for tensor in store.tensors():
            row = tensor.shape[2] * tensor.element_size() if tensor.dim() == 3 else tensor.element_size()
            assert tensor.data_ptr() % ALIGN == pool.data_ptr() % ALIGN
            assert tensor.stride(0) * tensor.element_size() == page.nbytes
            assert page.nbytes % row == 0
            held += tensor[0].numel() * tensor.element_size()
            buffers += 1
    assert held <= page.used < held + buffers * ALIGN
    assert page.used <= page.nbytes
    assert page.nbytes % PAGE_ALIGN == 0


def test_a_rank_takes_the_largest_page() -> None:
    page = page_of(torch.float32, 64)
    assert PageLayout.of(LAYERS[:1], 64, torch.float32, page.nbytes).nbytes == page.nbytes


def test_layers_have_their_own_parts() -> None:
    page = page_of(torch.float32, 64)
    parts = [page.part(layer) for layer in range(len(LAYERS))]
    assert [part.start for part in parts] == list(page.offsets)
    assert all(a.stop == b.start for a, b in pairwise(parts))
