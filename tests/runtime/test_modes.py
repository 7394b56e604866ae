"""Whatever torch is set to: default dtypes, autocast, inference mode."""

from __future__ import annotations

import copy

import pytest
import torch
from profiles import with_rotary

from kvcompile.runtime import attach, fitted, generate

ROWS = [[10, 30, 7], [12, 3, 64], [128, 20, 9]]
BITS = [(32, 32), (8, 4), (4, 8), (4, 4)]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("policy", ["recent", "snapkv", "scored", "h2o"])
def test_a_default_dtype_of_16_bits_changes_nothing(llama, make_artifact, default_dtype, policy: str) -> None:
    """Scratch of the kernels is not of the default dtype."""
    with attach(llama, make_artifact(llama, ROWS, policy=policy, recent=2, bits=BITS)) as kv:
        first = kv.new_cache()
        expected = generate(llama, first, prompt(100), max_new_tokens=12)
        more = generate(llama, first, prompt(9, 1), max_new_tokens=3)
        default_dtype(torch.bfloat16)
        cache = kv.new_cache()
        assert cache.nbytes == first.nbytes
        assert torch.equal(generate(llama, cache, prompt(100), max_new_tokens=12), expected)
        assert torch.equal(generate(llama, cache, prompt(9, 1), max_new_tokens=3), more)


@torch.no_grad()
def test_steps_under_autocast(llama, make_artifact) -> None:
    """Rotated queries and keys are float32 there, values are not."""
    with attach(llama, make_artifact(llama, policy="recent")) as kv, torch.autocast("cpu", torch.bfloat16):
        cache = kv.new_cache()
        llama(prompt(19), past_key_values=cache)
        found = llama(prompt(1, 5), past_key_values=cache).logits
        expected = llama(torch.cat([prompt(19), prompt(1, 5)], 1)).logits[:, -1:]
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_prompt_is_cut_in_float32_under_autocast(llama, make_artifact, monkeypatch) -> None:
    """A GPU solves no systems of equations in 16 bits."""
    seen = []

    def noting(gram: torch.Tensor, right: torch.Tensor, ridge: float) -> torch.Tensor:
        seen.append((gram.dtype, right.dtype))
        return torch.zeros_like(right)

    monkeypatch.setattr(fitted, "_solved", noting)
    artifact = with_rotary(make_artifact(llama, 20, policy="scored", recent=3), llama)
    with attach(llama, artifact) as kv, torch.autocast("cpu", torch.bfloat16):
        generate(llama, kv.new_cache(), prompt(40), max_new_tokens=2)
    assert set(seen) == {(torch.float32, torch.float32)}


def test_a_default_device_changes_nothing(llama, make_artifact) -> None:
    with attach(llama, make_artifact(llama, 20, policy="scored", recent=3)) as kv:
        expected = generate(llama, kv.new_cache(), prompt(40), max_new_tokens=5, eos=[1])
        cache, ids = kv.new_cache(), prompt(40)
        with torch.device("meta"):
            found = generate(llama, cache, ids, max_new_tokens=5, eos=[1])
    assert torch.equal(found, expected)


def test_a_cache_that_follows_its_batch_can_be_written_in_any_mode(llama, make_artifact) -> None:
    with attach(llama, make_artifact(llama, 20, policy="scored", recent=3)) as kv:
        cache = kv.new_cache(1)
        first = generate(llama, cache, prompt(30, batch=2), max_new_tokens=3)  # in inference mode
        with torch.no_grad():
            llama(prompt(4, 1, 2), past_key_values=cache)
        cache.reset()
        assert torch.equal(generate(llama, cache, prompt(30, batch=2), max_new_tokens=3), first)
        with torch.inference_mode():
            cache = kv.new_cache(2)
        with torch.no_grad():
            llama(prompt(30, batch=2), past_key_values=cache)
            llama(prompt(4, 1, 2), past_key_values=cache)


@pytest.mark.parametrize("bits", [(), BITS], ids=["exact", "quantised"])
@pytest.mark.parametrize("policy", ["recent", "scored", "h2o"])
@torch.no_grad()
def test_follow_ups_under_autocast(llama, make_artifact, policy: str, bits) -> None:
    with attach(llama, make_artifact(llama, ROWS, policy=policy, recent=3, bits=bits)) as kv:
        cache = kv.new_cache()
        with torch.autocast("cpu", torch.bfloat16):
            llama(prompt(40), past_key_values=cache)
            llama(prompt(9, 1), past_key_values=cache)
        assert cache.ragged[0].store.seen == [49]


@pytest.mark.parametrize("policy", ["scored", "h2o"])
@pytest.mark.parametrize("change", ["fork", "repeat", "select", "reorder"])
def test_what_is_made_of_a_cache_in_inference_mode_can_be_written_in_any(llama, make_artifact, change, policy) -> None:
    with attach(llama, make_artifact(llama, 20, policy=policy, recent=3)) as kv:
        cache = kv.new_cache(2)
        with torch.inference_mode():
            generate(llama, cache, prompt(30, batch=2), max_new_tokens=3)
            match change:
                case "fork":
                    cache = copy.deepcopy(cache)
                case "repeat":
                    cache.batch_repeat_interleave(2)
                case "select":
                    cache.batch_select_indices(torch.tensor([1]))
                case "reorder":
                    cache.reorder_cache(torch.tensor([1, 0]))
        batch = cache.ragged[0].store.batch
        with torch.no_grad():
            llama(prompt(4, 1, batch), past_key_values=cache)
            llama(prompt(1, 1, batch), past_key_values=cache)
        cache.reset()
