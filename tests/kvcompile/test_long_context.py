"""Contexts longer than the profile: keys with large biases, as Qwen2's, whose slow components have not turned within
the profile's tokens and have at the end of the context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, Qwen2Config, Qwen2ForCausalLM

from kvcompile import build
from kvcompile.artifacts import Artifact
from kvcompile.assemble import stored_parts
from kvcompile.compiler import resolve
from kvcompile.quantiser import for_context
from kvcompile.runtime import attach

PROFILED, CONTEXT = 512, 8192
FORMAT = Path(__file__).parents[2] / "artifacts" / "FORMAT.md"


@pytest.fixture(scope="module")
def biased() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=260, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2 * CONTEXT, initializer_range=0.1, bos_token_id=None,
        eos_token_id=256, pad_token_id=256, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    # Components that take 3,000 to 60,000 tokens for a turn.
    slow = [d + half for half in (0, 32) for d in range(14, 22)]
    for layer in model.model.layers:
        bias = torch.zeros(64)
        bias[slow] = 20 * torch.randn(len(slow))
        layer.self_attn.k_proj.bias.data = bias
    return model


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def compiled(biased: Qwen2ForCausalLM, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVCOMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build(biased, tokenizer, mem="100%", context=CONTEXT, kv_dtype="int4", profile_tokens=PROFILED)


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(FORMAT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    return ids[:, :CONTEXT]


@torch.inference_mode()
def loss(model: Qwen2ForCausalLM, artifact: Artifact, ids: torch.Tensor) -> float:
    """Mean KL to the full cache over the last 256 tokens of `ids`."""

    def said(cache: object) -> torch.Tensor:
        model(ids[:, :-256], past_key_values=cache, logits_to_keep=1)
        return model(ids[:, -256:], past_key_values=cache).logits[0].log_softmax(-1)

    full = said(DynamicCache(config=model.config))
    with attach(model, artifact) as kv:
        return (full.exp() * (full - said(kv.new_cache()))).sum(-1).mean().item()


def test_keys_are_quantised_for_the_context(biased: Qwen2ForCausalLM, compiled: Artifact, text: torch.Tensor) -> None:
    """A profile of 512 tokens serves 8,192; with the quantiser of the profile's own positions KL is 0.05."""
    assert loss(biased, compiled, text) < 0.01
    keys = stored_parts(compiled).profile.keys
    assert keys is not None
    assert compiled.quantiser is not None
    near = replace(compiled, quantiser=for_context(compiled.quantiser, keys, [PROFILED] * 2, PROFILED))
    assert loss(biased, near, text) > 0.02, "nothing turns, so the test shows nothing"


def test_another_context_is_solved_for_without_the_model(biased: Qwen2ForCausalLM, compiled: Artifact) -> None:
    """From a plan for the profile's own positions to one for the whole context: the same quantiser as built."""
    short = resolve(compiled, mem="100%", context=PROFILED, kv_dtype="int4")
    again = resolve(short, mem="100%", context=CONTEXT, kv_dtype="int4")
    assert short.quantiser is not None
    assert again.quantiser is not None
    assert compiled.quantiser is not None
    assert (again.quantiser.key_transform == compiled.quantiser.key_transform).all()
    assert (again.quantiser.key_mean == compiled.quantiser.key_mean).all()
    assert (short.quantiser.key_mean != compiled.quantiser.key_mean).any()
    assert again.predicted_loss > 1.5 * short.predicted_loss
