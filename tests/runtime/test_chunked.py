"""Llama-4: chunked attention within its first chunk, and queries scaled by their positions."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import CONFIGS, tiny_model
from transformers import DynamicCache

from kvcompile.artifacts import CacheError
from kvcompile.runtime import attach, generate, generate_full
from kvcompile.runtime.decode import Decoder

CHUNK = 100


@pytest.fixture(scope="module")
def model():
    config = copy.deepcopy(CONFIGS["llama4"])
    config.attention_chunk_size, config.floor_scale, config.attn_scale = CHUNK, 20, 0.5
    return tiny_model(config)


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("chunk", [7, 64])
@torch.no_grad()
def test_text_to_the_end_of_the_chunk_is_the_models_own(model, make_artifact, chunk: int) -> None:
    """However it is read: at once or in pieces, with a follow-up, and step by step."""
    whole = DynamicCache(config=model.config)
    text = generate_full(model, whole, prompt(50), max_new_tokens=20)
    rest = generate_full(model, whole, prompt(9, 1), max_new_tokens=20)
    with attach(model, make_artifact(model, context=CHUNK)) as kv:
        cache = kv.new_cache()
        assert torch.equal(generate(model, cache, prompt(50), max_new_tokens=20, prefill_chunk=chunk), text)
        assert torch.equal(generate(model, cache, prompt(9, 1), max_new_tokens=20, prefill_chunk=chunk), rest)


@torch.no_grad()
def test_positions_scale_queries(model) -> None:
    """What the test above would not see otherwise."""
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        layer.self_attn.attn_temperature_tuning = False
    assert not torch.allclose(plain(prompt(50)).logits, model(prompt(50)).logits, atol=1e-2)


@pytest.mark.parametrize("how", ["prompt", "pieces", "follow-up", "step"])
@torch.no_grad()
def test_beyond_the_chunk_is_refused(model, make_artifact, how: str) -> None:
    with attach(model, make_artifact(model, context=CHUNK)) as kv:
        decoder = Decoder(model, kv.new_cache(), prefill_chunk=16 if how == "pieces" else None)
        if how in ("follow-up", "step"):
            decoder.prefill(prompt(CHUNK - 1))
            decoder.step()
        with pytest.raises(CacheError, match=f"attends in chunks of {CHUNK} tokens, and a compiled cache holds the fi"):
            decoder.step() if how == "step" else decoder.prefill(prompt(3 if how == "follow-up" else CHUNK + 1))
