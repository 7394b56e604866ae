"""Heads of 4 and 8 bits: close to the full cache, in exactly the bytes promised."""

from __future__ import annotations

import copy

import pytest
import torch

from kvcompile.runtime import attach

POLICIES = ["recent", "h2o", "snapkv", "scored"]
MIXED = [(8, 8), (32, 8), (8, 4), (4, 32), (4, 4)]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_eight_bits_at_full_length_are_close_to_the_full_cache(any_model, make_artifact) -> None:
    plain = any_model(torch.cat([prompt(40), prompt(9, 1)], 1)).logits[:, 40:]
    kv = attach(any_model, make_artifact(any_model, bits=[(8, 8)], context=64))
    cache = kv.new_cache()
    any_model(prompt(40), past_key_values=cache)
    fork = copy.deepcopy(cache)
    at_once = any_model(prompt(9, 1), past_key_values=cache).logits
    by_one = [any_model(prompt(9, 1)[:, t : t + 1], past_key_values=fork).logits for t in range(9)]
    # An expert may be chosen otherwise, after which everything is a little different.
    limit = 0.1 if any_model.config.model_type in ("mixtral", "qwen3_moe") else 2e-3
    for logits in (at_once, torch.cat(by_one, 1)):
        assert (logits - plain).square().mean() < limit * plain.var()


def test_four_bits_lose_more_than_eight_and_sixteen_nothing(llama, make_artifact) -> None:
    whole = torch.cat([prompt(60), prompt(12, 1)], 1)
    plain = llama(whole).logits[:, 60:]
    errors = []
    for bits in ([(32, 32)], [(8, 8)], [(4, 4)]):
        with attach(llama, make_artifact(llama, bits=bits)) as kv:
            cache = kv.new_cache()
            llama(prompt(60), past_key_values=cache)
            errors.append((llama(prompt(12, 1), past_key_values=cache).logits - plain).square().mean().item())
    assert errors[0] < 1e-9
    assert 10 * errors[0] < errors[1] < errors[2] / 10


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_are_those_promised_and_nothing_moves(llama, make_artifact, policy, batch) -> None:
    artifact = make_artifact(
        llama, [[10, 30, 7], [12, 3, 64], [128, 20, 9]], policy=policy, recent=2, batch=batch, bits=MIXED
    )
    kv = attach(llama, artifact)
    cache = kv.new_cache(batch)
    assert cache.nbytes == artifact.bytes.resident
    llama(prompt(50, batch=batch), past_key_values=cache)
    places = [tensor.data_ptr() for tensor in cache.tensors()]
    for t in range(40):
        llama(prompt(1, t, batch), past_key_values=cache)
    llama(prompt(6, batch=batch), past_key_values=cache)
    assert [tensor.data_ptr() for tensor in cache.tensors()] == places
    assert cache.nbytes == artifact.bytes.resident == sum(t.untyped_storage().nbytes() for t in cache.tensors())


@pytest.mark.parametrize("policy", POLICIES)
def test_beams_and_forks_of_quantised_caches(llama, make_artifact, policy) -> None:
    kv = attach(llama, make_artifact(llama, [[30] * 3] * 3, policy=policy, recent=4, bits=MIXED))
    cache = kv.new_cache()
    llama(prompt(50), past_key_values=cache)
    fork = copy.deepcopy(cache)
    a, b = (llama(prompt(5, 9), past_key_values=one).logits for one in (cache, fork))
    assert torch.equal(a, b)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    text = llama.generate(prompt(40), past_key_values=kv.new_cache(1), **options)
    assert text.shape == (1, 48)


def test_the_first_token_of_a_decoded_sequence_is_kept_exactly(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, bits=[(4, 4)], shuffle=False))
    cache = kv.new_cache()
    llama(prompt(1), past_key_values=cache)
    store = cache.ragged[0].store
    first = store.keys.anchors.clone()
    assert first.abs().sum() > 0
    for t in range(5):
        llama(prompt(1, t), past_key_values=cache)
    assert torch.equal(store.keys.anchors, first)


def test_detached_the_model_is_what_it_was(llama, make_artifact) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    with attach(llama, make_artifact(llama, policy="scored", capacity=20, recent=3, bits=MIXED)) as kv:
        llama.generate(prompt(30), past_key_values=kv.new_cache(), max_new_tokens=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
