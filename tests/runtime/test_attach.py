"""Attaching, exactness with everything kept, and giving the model back."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import CONFIGS, tiny_model
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from kvcompile.artifacts import CacheError, ModelError, planned_heads, write
from kvcompile.runtime import attach, reorder, tensor_parallel

PROMPT = torch.arange(3, 3 + 40).remainder(97).view(1, -1)


def greedy(model, cache, ids=PROMPT, count=20):
    return model.generate(ids, past_key_values=cache, max_new_tokens=count, do_sample=False)


def test_a_full_target_reproduces_the_full_cache(any_model, make_artifact) -> None:
    plain_logits = any_model(PROMPT).logits
    plain_text = greedy(any_model, DynamicCache(config=any_model.config))
    follow_up = torch.cat([PROMPT, PROMPT[:, :9]], dim=1)
    plain_follow_up = any_model(follow_up).logits[:, -9:]

    kv = attach(any_model, make_artifact(any_model))
    torch.testing.assert_close(any_model(PROMPT, past_key_values=kv.new_cache()).logits, plain_logits)
    assert torch.equal(greedy(any_model, kv.new_cache()), plain_text)
    cache = kv.new_cache()
    any_model(PROMPT, past_key_values=cache)
    torch.testing.assert_close(any_model(PROMPT[:, :9], past_key_values=cache).logits, plain_follow_up)


def test_an_attached_model_works_as_before_with_other_caches(any_model, make_artifact) -> None:
    plain = any_model(PROMPT).logits
    text = greedy(any_model, DynamicCache(config=any_model.config))
    attach(any_model, make_artifact(any_model, 9))
    torch.testing.assert_close(any_model(PROMPT).logits, plain)
    assert torch.equal(greedy(any_model, DynamicCache(config=any_model.config)), text)


def test_attention_that_would_not_see_the_cache_is_refused(any_model, make_artifact) -> None:
    kv = attach(any_model, make_artifact(any_model, 9))
    any_model.set_attn_implementation("eager")
    with pytest.raises(CacheError, match=r"set to 'eager' since .*set_attn_implementation\('kvcompile'\)"):
        any_model(PROMPT, past_key_values=kv.new_cache())
    any_model(PROMPT)
    any_model.set_attn_implementation("kvcompile")
    any_model(PROMPT, past_key_values=kv.new_cache())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_detach_gives_back_every_bit(any_model, make_artifact, dtype: torch.dtype) -> None:
    any_model.to(dtype)
    before = copy.deepcopy(any_model.state_dict())
    implementation = any_model.config._attn_implementation
    kv = attach(any_model, make_artifact(any_model, 9, dtype=str(dtype).removeprefix("torch.")))
    moved = [name for name, weight in any_model.state_dict().items() if not torch.equal(weight, before[name])]
    if planned_heads(any_model.config)[0] > 1:
        assert moved, "the heads were not reordered, so the test shows nothing"
    assert all("self_attn" in name for name in moved)
    kv.detach()
    kv.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in any_model.state_dict().items())
    assert any_model.config._attn_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in any_model.modules())


def test_attach_is_a_context_manager_and_reads_a_file(llama, make_artifact, tmp_path) -> None:
    write(make_artifact(llama, 9), tmp_path / "a.kvb")
    before = copy.deepcopy(llama.state_dict())
    with attach(llama, tmp_path / "a.kvb") as kv:
        assert greedy(llama, kv.new_cache()).shape == (1, 60)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())


def test_another_model_is_refused_and_left_alone(llama, make_artifact) -> None:
    artifact = make_artifact(llama, 9)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(ModelError, match="weights"):
        attach(llama, artifact)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())


def test_an_unsupported_architecture_is_refused(llama, make_artifact) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=3))
    with pytest.raises(ModelError, match="gpt2"):
        attach(gpt2, make_artifact(llama))


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_a_policy_that_cannot_follow_the_models_attention_is_refused(family: str) -> None:
    model = tiny_model(CONFIGS[family])
    kv = attach(model, tiny_models.make_artifact(model, 9, policy="h2o", recent=3))
    with pytest.raises(CacheError, match=r"policy .* \(h2o\) cannot follow a model with learned sinks or capped"):
        model(PROMPT, past_key_values=kv.new_cache())


def test_a_second_attachment_is_refused(llama, make_artifact) -> None:
    artifact = make_artifact(llama, 9)
    attach(llama, artifact)
    with pytest.raises(ModelError, match="detach"):
        attach(llama, artifact)


def test_a_cache_outlives_neither_its_attachment_nor_its_model(llama, make_artifact) -> None:
    artifact = make_artifact(llama, 9)
    kv = attach(llama, artifact)
    cache = kv.new_cache()
    llama(PROMPT, past_key_values=cache)
    kv.detach()
    with pytest.raises(CacheError, match="attached"):
        llama(PROMPT, past_key_values=cache)
    with attach(llama, artifact), pytest.raises(CacheError, match="another attachment"):
        llama(PROMPT, past_key_values=cache)


def test_head_order_matters_only_to_the_store(llama, make_artifact) -> None:
    """Budgets follow the model's own heads, however they are stored."""
    rows = [[20, 9, 5], [5, 20, 9], [9, 5, 20]]
    texts = []
    for shuffle in (True, False):
        artifact = make_artifact(llama, rows, shuffle=shuffle)
        if not shuffle:
            order = np.broadcast_to(np.arange(3, dtype=np.int32), (3, 3))
            artifact = dataclasses.replace(artifact, budgets=dataclasses.replace(artifact.budgets, head_order=order))
        with attach(llama, artifact) as kv:
            cache = kv.new_cache()
            greedy(llama, cache)
            texts.append(llama(PROMPT[:, :5], past_key_values=cache).logits)
    torch.testing.assert_close(texts[0], texts[1])


def test_the_runtime_loads_neither_scipy_nor_click() -> None:
    """In a fresh process; what `import transformers` loads by itself (click, with huggingface_hub 1) is not ours."""
    heavy = "{'scipy', 'click', 'matplotlib', 'rich', 'kvcompile.compiler'} & sys.modules.keys()"
    code = f"import sys, MODULE; print(sorted({heavy}))"
    loaded = [
        subprocess.run(
            [sys.executable, "-c", code.replace("MODULE", module)], capture_output=True, text=True, check=True, cwd="/"
        ).stdout
        for module in ("transformers", "kvcompile.runtime")
    ]
    assert loaded[1] == loaded[0]
    assert "scipy" not in loaded[1]
    if int(importlib.metadata.version("huggingface_hub").split(".")[0]) >= 2:
        assert loaded[1].strip() == "[]"


def test_a_detached_attachment_leaves_the_next_one_alone(llama, make_artifact) -> None:
    before, artifact = copy.deepcopy(llama.state_dict()), make_artifact(llama, 9)
    turned = dataclasses.replace(artifact.budgets, head_order=artifact.budgets.head_order[:, ::-1].copy())
    first = attach(llama, artifact)
    first.detach()
    second = attach(llama, dataclasses.replace(artifact, budgets=turned))
    first.detach()
    llama(PROMPT, past_key_values=second.new_cache())
    second.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())


@pytest.mark.parametrize("failing", ["separate", "inverse"])
def test_a_detach_that_fails_can_be_repeated(llama, make_artifact, monkeypatch, failing: str) -> None:
    """For want of memory, say."""
    before, artifact = copy.deepcopy(llama.state_dict()), make_artifact(llama, 9)
    kv = attach(llama, artifact)

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["kvcompile.runtime.attach"], failing, fails)
        with pytest.raises(torch.OutOfMemoryError):
            kv.detach()
    kv.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
    with attach(llama, artifact):
        pass


@pytest.mark.parametrize("failing", [1, 3, 9, 14])
def test_an_attachment_that_fails_half_way_is_undone(llama, make_artifact, monkeypatch, failing: int) -> None:
    before, artifact, calls = copy.deepcopy(llama.state_dict()), make_artifact(llama, 9), []

    def permute(*args) -> None:
        calls.append(args)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("no memory for a copy")
        tensor_parallel.permute(*args)

    with monkeypatch.context() as patch:
        patch.setattr(reorder, "permute", permute)
        with pytest.raises(torch.OutOfMemoryError):
            attach(llama, artifact)
    assert all(torch.equal(weight, before[name]) for name, weight in llama.state_dict().items())
    assert llama.config._attn_implementation != "kvcompile"
    with attach(llama, artifact) as kv:
        llama(PROMPT, past_key_values=kv.new_cache())


@pytest.mark.parametrize("policy", ["recent", "scored"])
@torch.no_grad()
def test_an_interrupted_pass_is_forgotten(llama, make_artifact, policy: str) -> None:
    """torch calls no hook after a KeyboardInterrupt."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with attach(llama, make_artifact(llama, 20, policy=policy, recent=3)) as kv:
        expected = llama(PROMPT, use_cache=False).logits
        hook = llama.model.layers[1].self_attn.o_proj.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama(PROMPT[:, :9], past_key_values=kv.new_cache())
        hook.remove()
        assert torch.equal(llama(PROMPT, use_cache=False).logits, expected)
