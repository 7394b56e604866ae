"""A prompt that the model read before an artifact was attached, cut as if the attached model had read it."""

from __future__ import annotations

import pytest
import torch

from kvcompile.artifacts import identify
from kvcompile.runtime import Decoder, attach, filled, generate, generate_full, looks_at_queries, read_prompt
from kvcompile.runtime.parts import planned

BITS = [(32, 32), (8, 4), (4, 8), (4, 4)]


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("policy", ["recent", "scored"])
def test_a_cache_is_filled_as_by_the_attached_model(any_model, make_artifact, policy: str) -> None:
    before = read_prompt(any_model, prompt(53))
    if before is None:
        pytest.skip("layers with less than all keys and values: the next test")
    with attach(any_model, make_artifact(any_model, 14, policy=policy, recent=3)) as kv:
        assert not looks_at_queries(kv)
        own, other = kv.new_cache(), filled(kv, before)
        Decoder(any_model, own).prefill(prompt(53))
        assert own.counts() == other.counts()
        for a, b in zip(own.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        one, two = (generate(any_model, cache, prompt(7), max_new_tokens=6) for cache in (own, other))
        assert torch.equal(one, two)


@pytest.mark.parametrize("policy", ["recent", "scored"])
def test_prompts_of_unequal_length_side_by_side(llama, make_artifact, policy: str) -> None:
    prompts, asked = (prompt(53), prompt(9), prompt(80)), (prompt(7), prompt(5), prompt(2))
    before = [read_prompt(llama, ids) for ids in prompts]
    with attach(llama, make_artifact(llama, 14, policy=policy, recent=3)) as kv:
        alone = [
            generate(llama, filled(kv, one), ids, max_new_tokens=6) for one, ids in zip(before, asked, strict=True)
        ]
        cache = filled(kv, *before)
        assert cache.ragged[0].store.seen == [53, 9, 80]
        ids, real = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.long)
        for row, one in enumerate(asked):
            ids[row, -one.shape[1] :], real[row, -one.shape[1] :] = one, 1
        together = generate(llama, cache, ids, attention_mask=real, max_new_tokens=6)
    assert torch.equal(together, torch.cat(alone))


def test_what_is_not_there_is_not_made_up(any_model) -> None:
    windowed = any(0 < window < 53 for window in identify(any_model, "tiny").windows)
    left_alone = not all(map(planned, any_model.model.layers))
    assert (read_prompt(any_model, prompt(53)) is None) == (windowed or left_alone)
    if left_alone:
        assert read_prompt(any_model, prompt(10)) is None, "that a window holds all of it makes no difference"


def test_quantised_heads_and_the_full_cache(llama, make_artifact) -> None:
    before = read_prompt(llama, prompt(53))
    plain = llama.generate(prompt(53), max_new_tokens=6, do_sample=False, eos_token_id=-1)[:, 53:]
    first = plain[:, :1]
    assert torch.equal(generate_full(llama, before.full_cache(llama), first, max_new_tokens=5), plain[:, 1:])
    with attach(llama, make_artifact(llama, bits=BITS)) as kv:
        own, other = kv.new_cache(), filled(kv, before)
        Decoder(llama, own).prefill(prompt(53))
        one, two = (generate(llama, cache, prompt(7), max_new_tokens=6) for cache in (own, other))
    assert torch.equal(one, two)
    assert all(layer.keys.shape[2] == 53 for layer in before.full_cache(llama).layers), "nobody has written to it"


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_policies_that_look_at_queries_are_known(llama, make_artifact, policy: str) -> None:
    with attach(llama, make_artifact(llama, 14, policy=policy, recent=3)) as kv:
        assert looks_at_queries(kv)
