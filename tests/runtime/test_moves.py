"""A model that is moved to another dtype or device while an artifact is attached."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from kvcompile.artifacts import CacheError, Scorer
from kvcompile.runtime import attach, generate
from kvcompile.runtime.layer_scorer import LayerScorer

BITS = [(32, 32), (8, 4), (4, 8), (4, 4)]
ROWS = [[10, 30, 7], [12, 3, 64], [128, 20, 9]]
META = torch.device("meta")
"""Stands for another device: shapes without numbers."""


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def logits_and_scores(model, cache) -> list[torch.Tensor]:
    calls = [40, 1, 1, 1, 5, 1]
    logits = [model(prompt(n, seed), past_key_values=cache).logits for seed, n in enumerate(calls)]
    return logits + [layer.store.scores for layer in cache.layers]


@pytest.fixture
def scored(llama, make_artifact):
    return make_artifact(llama, ROWS, policy="scored", recent=2, bits=BITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_another_dtype_after_attach_is_another_dtype_before(llama, scored, dtype: torch.dtype) -> None:
    """To the last bit, so scorer and transforms are not rounded with the weights."""
    before, after = copy.deepcopy(llama).to(dtype), llama
    expected = logits_and_scores(before, attach(before, scored).new_cache())
    kv = attach(after, scored)
    cache = kv.new_cache()
    after.to(dtype)
    for given in (cache, kv.new_cache()):
        found = logits_and_scores(after, given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_state_dict_is_the_models_own_and_detach_gives_back_every_bit(llama, scored) -> None:
    plain, names = copy.deepcopy(llama), list(llama.state_dict())
    modules, buffers = len(list(llama.modules())), [name for name, _ in llama.named_buffers()]
    kv = attach(llama, scored)
    assert list(llama.state_dict()) == names
    llama.half()
    llama(prompt(30), past_key_values=kv.new_cache())
    assert list(llama.state_dict()) == names
    kv.detach()
    expected = plain.half().state_dict()
    assert list(llama.state_dict()) == list(expected)
    assert all(torch.equal(weight, expected[name]) for name, weight in llama.state_dict().items())
    assert len(list(llama.modules())) == modules
    assert [name for name, _ in llama.named_buffers()] == buffers


def test_the_scorer_follows_to_another_device_in_float32() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((1, 2, 4)).astype(np.float16)
    scorer = LayerScorer(Scorer(weight, np.zeros((1, 2), np.float32)), 0, [1, 0], torch.zeros(1))
    with torch.inference_mode():
        score = scorer(torch.zeros(1, 3, 4, dtype=torch.bfloat16, device=META))
    assert (score.device, score.dtype, score.shape) == (META, torch.float32, (1, 3, 2))
    assert (scorer.weight.device, scorer.weight.dtype) == (META, torch.float32)
    assert (scorer.bias.device, scorer.bias.dtype) == (META, torch.float32)
    # What moved in inference mode serves autograd afterwards.
    scorer(torch.zeros(1, 3, 4, device=META, requires_grad=True)).sum().backward()


def test_a_new_cache_lies_where_the_model_is_and_an_older_one_is_refused(llama, scored) -> None:
    kv = attach(llama, scored)
    used, unused = kv.new_cache(), kv.new_cache()
    llama(prompt(30), past_key_values=used)
    held = [tensor.clone() for tensor in used.tensors()]
    llama.to(META)
    for cache, length in ((used, 1), (used, 4), (unused, 30)):
        with pytest.raises(
            CacheError, match=r"is on cpu and the model now on meta: take another one from new_cache\(\)"
        ):
            llama(prompt(length).to(META), past_key_values=cache)
    assert all(torch.equal(tensor, before) for tensor, before in zip(used.tensors(), held, strict=True))
    cache = kv.new_cache()
    assert {tensor.device for tensor in cache.tensors()} == {META}
    transforms = [layer.store.transform for layer in cache.layers]
    assert {tensor.device for transform in transforms for tensor in vars(transform).values()} == {META}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_moved_to_a_gpu_after_attach_decodes_as_one_attached_there(llama, scored) -> None:
    ids = prompt(40).cuda()
    there = copy.deepcopy(llama).cuda()
    expected = generate(there, attach(there, scored).new_cache(), ids, max_new_tokens=20)
    kv = attach(llama, scored)
    generate(llama, kv.new_cache(), ids.cpu(), max_new_tokens=3)
    llama.cuda()
    assert torch.equal(generate(llama, kv.new_cache(), ids, max_new_tokens=20), expected)
