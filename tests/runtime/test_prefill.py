"""Prompts read in chunks against prompts read at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, tiny_model
from transformers import PreTrainedModel

from kvcompile.artifacts import CacheError
from kvcompile.runtime import Decoder, RaggedCache, attach, generate, store
from kvcompile.runtime.cut import kept_columns, kept_tokens
from kvcompile.runtime.drawn import attention_drawn
from kvcompile.runtime.prefill import read

POLICIES = ["recent", "snapkv", "scored", "h2o"]
ROWS = [[20, 9, 5], [5, 40, 9], [9, 5, 20]]
BITS = [(32, 32), (8, 4), (4, 8), (4, 4)]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What every cut keeps, by class, sequence and layer."""
    found: list[torch.Tensor] = []
    compact = store.compact

    def watch(*args: Any) -> None:
        found.extend(column[b, :, :n] for column in args[5] for b, n in enumerate(args[6].tolist()))
        compact(*args)

    monkeypatch.setattr(store, "compact", watch)
    return found


class Logits:
    """Logits of the last token at every call of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.found: list[torch.Tensor] = []
        model.register_forward_hook(lambda _, args, out: self.found.append(out.logits[:, -1]))


def check(
    model: PreTrainedModel,
    caches: tuple[RaggedCache, RaggedCache],
    kept: list[torch.Tensor],
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    chunk: int,
) -> None:
    """Both ways keep the same tokens, and lead to the same logits after the prompt, in steps and after a follow-up."""
    logits, texts, cuts = Logits(model), [], []
    for cache, length in zip(caches, (10_000, chunk), strict=True):
        kept.clear()
        decoder = Decoder(model, cache, prefill_chunk=length)
        texts.append([decoder.prefill(ids, mask), *(decoder.step().clone() for _ in range(4))])
        more = prompt(6, 9, len(ids))
        texts[-1] += [decoder.prefill(more), *(decoder.step().clone() for _ in range(3))]
        cuts.append(list(kept))
    half = len(logits.found) // 2
    for one, two in zip(logits.found[:half], logits.found[half:], strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(*texts, strict=True))
    assert len(cuts[0]) == len(cuts[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*cuts, strict=True))
    assert caches[0].counts() == caches[1].counts()


def padded(ids: torch.Tensor, pads: list[int]) -> torch.Tensor:
    mask = torch.ones_like(ids)
    for row, pad in zip(mask, pads, strict=True):
        row[:pad] = 0
    return mask


@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_give_what_the_whole_prompt_gives(any_model, make_artifact, kept, policy: str) -> None:
    """Every family and its windows, with and without padding."""
    kv = attach(any_model, make_artifact(any_model, 14, policy=policy, recent=5))
    check(any_model, (kv.new_cache(), kv.new_cache()), kept, prompt(53), None, 16)
    ids = prompt(53, 1, 3)
    check(any_model, (kv.new_cache(3), kv.new_cache(3)), kept, ids, padded(ids, [0, 30, 45]), 7)


@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 41, 100])
@pytest.mark.parametrize("bits", [(), BITS], ids=["exact", "quantised"])
@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_of_every_length(llama, make_artifact, kept, policy: str, bits, chunk: int) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=3, bits=bits))
    ids = prompt(41, 25, 3)  # no element lies so near to the edge of a code that rounding decides
    check(llama, (kv.new_cache(3), kv.new_cache(3)), kept, ids, None, chunk)
    check(llama, (kv.new_cache(3), kv.new_cache(3)), kept, ids, padded(ids, [36, 0, 12]), chunk)


@pytest.mark.parametrize("family", ["mistral, sliding", "gemma3", "gpt-oss", "olmo3"])
def test_chunks_know_the_models_window_beyond_the_context(make_artifact, family: str) -> None:
    """No sequence within the context of 20 tokens sees the window of 24, so that no store has it; this one does."""
    model, ids = tiny_model(CONFIGS[family]), prompt(60)
    with attach(model, make_artifact(model, 16, policy="recent", recent=3, context=20)) as kv:
        expected = model(ids, use_cache=False).logits[:, -1]
        for chunk in (16, 60):
            cache = kv.new_cache()
            found = read(model, cache, ids, torch.ones_like(ids), torch.zeros(1, 1, dtype=torch.int64), chunk, None)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_model_is_as_before_and_takes_whole_prompts(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS))
    before = [dict(vars(layer)) for layer in llama.model.layers]
    plain = llama(prompt(40)).logits
    cache = kv.new_cache()
    generate(llama, cache, prompt(40), max_new_tokens=3, prefill_chunk=8)
    assert [dict(vars(layer)) for layer in llama.model.layers] == before
    assert torch.equal(llama(prompt(40)).logits, plain)
    cache.reset()
    llama(prompt(40), past_key_values=cache)
    assert cache.layers[0].store.seen == [40]


def test_an_error_on_the_way_leaves_the_model_as_it_was(llama, make_artifact, monkeypatch) -> None:
    kv = attach(llama, make_artifact(llama, ROWS))
    before = [dict(vars(layer)) for layer in llama.model.layers]
    cache = kv.new_cache()
    monkeypatch.setattr(cache.layers[2].store, "cut", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(llama, cache, prompt(40), max_new_tokens=3, prefill_chunk=8)
    assert [dict(vars(layer)) for layer in llama.model.layers] == before
    assert all(layer.prompt is None for layer in cache.layers)


def test_an_empty_cache_follows_the_batch_of_its_prompt(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS))
    text = generate(llama, kv.new_cache(1), prompt(40, batch=3), max_new_tokens=5, prefill_chunk=8)
    assert torch.equal(text, generate(llama, kv.new_cache(3), prompt(40, batch=3), max_new_tokens=5))


def test_padding_elsewhere_is_moved_to_the_left(llama, make_artifact) -> None:
    """Of a whole prompt, whose mask is the caller's."""
    kv = attach(llama, make_artifact(llama, ROWS, policy="snapkv", recent=3))
    ids, mask = prompt(40, batch=2), torch.ones(2, 40, dtype=torch.int64)
    mask[1, 25:] = 0
    both, alone = kv.new_cache(2), kv.new_cache()
    llama(ids, attention_mask=mask, past_key_values=both)
    llama(ids[1:, :25], past_key_values=alone)
    for one, two in zip(both.layers, alone.layers, strict=True):
        for cls in one.store.layout.classes:
            filled = min(25, cls.capacity)
            a, b = (layer.store.keys.read(cls, filled, torch.float32)[-1] for layer in (one, two))
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_read_is_refused(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS))
    with pytest.raises(CacheError, match="chunks of 0 prompt tokens"):
        Decoder(llama, kv.new_cache(), prefill_chunk=0)
    with pytest.raises(CacheError, match="padded on the left"):
        Decoder(llama, kv.new_cache()).prefill(prompt(5), torch.tensor([[1, 1, 1, 0, 0]]))


def test_attention_drawn_in_blocks_leaves_padding_out(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 2, 7, 8, generator=generator)
    keys = torch.randn(2, 3, 20, 8, generator=generator)
    pad = torch.tensor([0, 16])
    whole = attention_drawn(query, keys, pad, 0.4)
    monkeypatch.setattr("kvcompile.runtime.drawn.LOGITS_AT_ONCE", 100)
    torch.testing.assert_close(attention_drawn(query, keys, pad, 0.4), whole)
    alone = attention_drawn(query[1:, :, :, 3:], keys[1:, :, 16:], None, 0.4)
    torch.testing.assert_close(whole[1:, :, 16:], alone)
    assert not whole[1, :, :16].any()


def test_sequences_of_all_lengths_keep_side_by_side_what_they_keep_alone() -> None:
    from kvcompile.kernels import HeadClass

    generator = torch.Generator().manual_seed(0)
    for capacity, sink, recent in [(9, 2, 3), (9, 2, 7), (1, 0, 1), (6, 0, 2), (30, 4, 10)]:
        cls = HeadClass("scored", 0, 2, capacity, sink, recent)
        pad = torch.arange(31)
        score = torch.randint(0, 4, (31, 2, 31), generator=generator).float()
        for given in (score, None):
            found = kept_columns(cls, 31, pad, given)
            for b in range(31):
                alone = kept_tokens(cls, 31 - b, None if given is None else given[b, :, b:], pad.device)
                assert torch.equal(found[b, :, : alone.shape[1]], alone + b)
