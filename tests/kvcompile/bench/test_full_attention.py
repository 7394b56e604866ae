"""What is compared with: every way to attend to a full cache gives the same, and so does a step with it."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch

from kvcompile.bench import full_attention, subjects
from kvcompile.bench.flashinfer import PAGE
from kvcompile.bench.full_attention import CacheShape, enable_gqa, flex, grouped, ways
from kvcompile.bench.full_step import full_step
from kvcompile.bench.subjects import random_model

CPU = torch.device("cpu")
SHAPE = CacheShape(batch=2, heads=3, context=64, head_dim=16, group=5, dtype=torch.float32, device=CPU)


class PagedWrapper:
    """FlashInfer's decoding over pages, in torch: as much of its interface as is called."""

    def __init__(self, workspace: torch.Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "HND"

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **kinds) -> None:
        self.pages = [indices[a:b] for a, b in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)]
        self.last, self.shape = last_page_len.tolist(), (num_qo_heads, num_kv_heads, head_dim, page_size)

    def run(self, query: torch.Tensor, paged: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        queries, heads, head_dim, page = self.shape
        assert query.shape == (len(self.pages), queries, head_dim)
        assert all(side.shape[1:] == (heads, page, head_dim) for side in paged)
        out = []
        for rows, pages, last in zip(query, self.pages, self.last, strict=True):
            tokens = (len(pages) - 1) * page + last
            keys, values = (side[pages.long()].transpose(0, 1).flatten(1, 2)[0, :tokens] for side in paged)
            out.append((rows @ keys.T * head_dim**-0.5).softmax(-1) @ values)
        return torch.stack(out)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    module.BatchDecodeWithPagedKVCacheWrapper = PagedWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)


def test_every_way_gives_the_same(flashinfer) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 15, 1, 16)
    keys, values = (torch.randn(2, 3, SHAPE.context, 16) for _ in range(2))
    expected = enable_gqa(SHAPE)(query, keys, values)
    assert SHAPE.bytes == 2 * keys.numel() * 4
    assert SHAPE.context % PAGE == 0
    flash = full_attention._backend("FLASH_ATTENTION")
    for way in (grouped, flash, flex, full_attention.flashinfer):
        torch.testing.assert_close(way(SHAPE)(query, keys, values), expected, atol=1e-5, rtol=1e-5)


def test_a_gpu_is_tried_with_more(flashinfer) -> None:
    assert set(ways(CPU)) < set(ways(torch.device("cuda")))
    assert "FlashInfer" in ways(torch.device("cuda"))


def test_a_step_with_another_attention_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "model_type": "qwen2", "hidden_size": 56, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 1024,
        "initializer_range": 0.2,
    }  # fmt: skip
    monkeypatch.setitem(subjects.CONFIGS, "tiny", config)
    model = random_model("tiny", torch.float32, CPU)
    heard: list[list[int]] = [[], []]
    for texts, way in zip(heard, (grouped, enable_gqa), strict=True):
        torch.manual_seed(0)
        hook = model.lm_head.register_forward_hook(
            lambda module, args, out, texts=texts: texts.append(int(out[0, -1].argmax()))
        )
        with full_step(model, 2, 64, 6, way) as step:
            for _ in range(6):
                step.run()
        hook.remove()
        assert model.config._attn_implementation == "sdpa"
    assert heard[0] == heard[1]
    assert len(set(heard[0])) > 2
    assert step.cache_bytes == 2 * 2 * 2 * 2 * 64 * 4 * 4  # layers, keys and values, batch, heads, tokens, size, bytes
