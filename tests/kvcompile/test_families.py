"""From a folder to an artifact to text, for families whose attention is more than Llama's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHAPE, configs, tiny_model
from transformers import DynamicCache

from kvcompile.artifacts import state_bytes
from kvcompile.compiler import build, resolve
from kvcompile.models import load
from kvcompile.runtime import attach, generate, generate_full

SIZES = SHAPE | {
    "vocab_size": 260, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None,
    "pad_token_id": 256, "eos_token_id": 256, "initializer_range": 0.1,
}  # fmt: skip
FAMILIES = configs(SIZES, 16, 32)
NEW = (
    "gemma2", "gemma3", "gemma4", "gemma4-shared", "gemma4-unified", "gpt-oss", "granite", "llama4", "olmo2", "olmo3",
    "qwen3-next", "qwen3.5", "qwen3.5-moe", "smollm3",
)  # fmt: skip


@pytest.fixture(scope="module", params=NEW)
def folder(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("family")
    tiny_model(FAMILIES[request.param]).save_pretrained(found)
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, found)
    return found


def test_no_plan_beyond_the_first_chunk(
    model_folder: Path, tmp_path: Path, kvcompile: Callable[..., tuple[int, str, str]]
) -> None:
    """Asked for or by default; neither when it is built nor when it is solved anew."""
    tiny_model(FAMILIES["llama4"]).save_pretrained(tmp_path)
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    plan, given = tmp_path / "plan.kvb", ["build", "--model", tmp_path, "--mem", "100%"]
    assert kvcompile(*given, "--context", 90, "--kv-dtype", "fp32", "--allocator", "uniform", "-o", plan)[0] == 0
    for command in (given, [*given, "--context", 401], ["build", "--from", plan, "--mem", "50%", "--context", 401]):
        status, out, errors = kvcompile(*command)
        assert (status, out, errors.count("\n")) == (2, "", 1)
        assert "attends in chunks of 400 tokens" in errors
        assert "expected a --context of at most 400" in errors


@torch.no_grad()
def test_built_run_and_given_back(folder: Path, tmp_path: Path, kvcompile: Callable[..., tuple[int, str, str]]) -> None:
    """All of the cache says what the model says; a part of it is kept to the byte; and the model is what it was."""
    loaded = load(str(folder), device="cpu")
    model: Any = loaded.model
    ids = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(0))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    part = build(model, loaded.tokenizer, mem="60%", context=128, out=tmp_path / "part.kvb")
    plain = model(ids).logits
    text = generate_full(model, DynamicCache(config=model.config), ids, max_new_tokens=20)
    whole = resolve(part, mem="100%")
    with attach(model, whole) as kv:
        torch.testing.assert_close(model(ids, past_key_values=kv.new_cache()).logits, plain, atol=1e-4, rtol=1e-3)
        assert torch.equal(generate(model, kv.new_cache(), ids, max_new_tokens=20), text)
    with attach(model, tmp_path / "part.kvb") as kv:
        cache, account = kv.new_cache(), kv.artifact.bytes
        assert generate(model, cache, ids, max_new_tokens=20).shape == (1, 20)
        assert cache.nbytes == account.resident <= kv.artifact.target.bytes < account.full
        assert cache.nbytes > state_bytes(kv.artifact.model, kv.artifact.target.dtype)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(ids).logits, plain)

    (tmp_path / "prompt.txt").write_text("What is kept of a text that is longer than the cache? " * 2)
    for command in (("run", "--compare", "--max-new-tokens", 4, "--prompt", tmp_path / "prompt.txt"), ("inspect",)):
        status, said, errors = kvcompile(command[0], tmp_path / "part.kvb", *command[1:])
        assert (status, bool(said)) == (0, True), errors
