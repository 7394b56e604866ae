"""Whatever torch is set to: default dtypes, autocast, inference mode."""

from __future__ import annotations

import pytest
import torch

from kvcompile.runtime import attach, generate

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
