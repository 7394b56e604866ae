"""Reading prompts in chunks on a GPU: torch's fused attention, and the memory it takes there."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SHAPE, tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from kvcompile.artifacts import feed_forward_elements, prefill_bytes
from kvcompile.kernels import prompt_attention
from kvcompile.runtime import Decoder, attach

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = LlamaConfig(
    **SHAPE | {
        "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "initializer_range": 0.05,
    }
)  # fmt: skip


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(0)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("pads", [None, [0, 55]])
@pytest.mark.parametrize(("length", "count"), [(200, 200), (64, 200), (1, 200), (77, 203)])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_of_a_chunk(dtype: torch.dtype, window: int, pads, length: int, count: int, head_dim: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(2, 8, length, head_dim, generator=generator, device="cuda").to(dtype)
    whole = torch.randn(2, 2, 2, 256, head_dim, generator=generator, device="cuda").to(dtype)
    keys, values = whole[0, :, :, :count], whole[1, :, :, :count]  # as they lie in a buffer for more
    pad = None if pads is None else torch.tensor(pads, device="cuda")
    found = prompt_attention(query, keys, values, pad, window, 0.11)
    row, column = torch.arange(count - length, count, device="cuda")[:, None], torch.arange(count, device="cuda")
    mask = ((column <= row) & (column > row - (window or count))).expand(2, 1, -1, -1)
    if pad is not None:
        mask = mask & ((column >= pad.view(-1, 1, 1, 1)) | (column == row))
    repeated = [tensor.float().repeat_interleave(4, dim=1) for tensor in (keys, values)]
    expected = scaled_dot_product_attention(query.float(), *repeated, attn_mask=mask, scale=0.11)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 4e-3
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("policy", ["recent", "snapkv", "scored", "h2o"])
def test_chunks_give_what_the_whole_prompt_gives(make_artifact, policy: str) -> None:
    model = tiny_model(CONFIG).cuda()
    kv = attach(model, make_artifact(model, 60, policy=policy, recent=9, context=1024))
    mask = torch.ones(3, 500, dtype=torch.int64)
    mask[1, :123] = 0
    logits: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, args, out: logits.append(out.logits[:, -1]))
    for given in (None, mask.cuda()):
        texts = []
        for chunk in (10_000, 64):
            decoder = Decoder(model, kv.new_cache(3), prefill_chunk=chunk)
            logits.clear()
            first = decoder.prefill(prompt(500, 3), given)
            texts.append((logits[0], torch.stack([first, *(decoder.step().clone() for _ in range(5))])))
        torch.testing.assert_close(texts[0][0], texts[1][0], atol=1e-3, rtol=1e-3)
        assert torch.equal(texts[0][1], texts[1][1])


@pytest.mark.parametrize(
    ("batch", "tokens", "chunk", "padded"), [(4, 8192, 1024, False), (4, 8192, 1024, True), (2, 2048, 2048, False)]
)
@pytest.mark.parametrize("policy", ["recent", "scored", "snapkv"])
def test_the_promised_memory_is_enough(make_artifact, policy: str, batch, tokens, chunk, padded) -> None:
    model = tiny_model(CONFIG, torch.bfloat16).cuda()
    plan = make_artifact(model, 200, policy=policy, recent=50, context=8192, dtype="bfloat16")
    kv = attach(model, plan)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    if padded:
        mask[1:, : tokens // 3] = 0
    ids, mask = prompt(tokens, batch), mask.cuda()
    taken = 0
    for _ in range(2):  # what libraries allocate once for themselves is there after the first
        cache = kv.new_cache(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Decoder(model, cache, prefill_chunk=chunk).prefill(ids, mask)
        taken = torch.cuda.max_memory_allocated() - before
    promised = prefill_bytes(plan, batch, tokens, chunk, inner=feed_forward_elements(model.config), padded=padded)
    assert 0.4 * promised <= taken <= promised
