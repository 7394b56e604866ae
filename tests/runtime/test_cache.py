"""What a ragged cache stores and how it behaves inside transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from kvcompile.artifacts import CacheError
from kvcompile.runtime import attach

POLICIES = ["recent", "h2o", "snapkv"]
ROWS = [[20, 9, 5], [5, 20, 9], [9, 5, 20]]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: PreTrainedModel, cache, ids: torch.Tensor, count: int = 16, **kwargs) -> torch.Tensor:
    return model.generate(ids, past_key_values=cache, max_new_tokens=count, do_sample=False, **kwargs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_promised_allocated_and_measured_agree(any_model, make_artifact, policy, batch, dtype) -> None:
    artifact = make_artifact(any_model, 9, policy=policy, recent=4, batch=batch, dtype=dtype)
    cache = attach(any_model, artifact).new_cache(batch)
    for length in (None, 5, 40):
        if length:
            cache.reset()
            greedy(any_model, cache, prompt(length, batch=batch))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors()}
        assert cache.nbytes == artifact.bytes.resident == sum(storages.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_grows_with_generated_tokens(llama, make_artifact, policy) -> None:
    cache = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=3)).new_cache()
    llama(prompt(40), past_key_values=cache)
    places = [t.data_ptr() for t in cache.tensors()]
    token = prompt(1)
    for _ in range(500):
        token = llama(token, past_key_values=cache).logits[:, -1:].argmax(-1)
    assert [t.data_ptr() for t in cache.tensors()] == places
    assert cache.get_seq_length() == 540


@pytest.mark.parametrize("length", [1, 3, 8, 9, 10, 30])
def test_recent_equals_masked_attention(llama, make_artifact, length: int) -> None:
    """Sinks plus a ring, decoded token by token, against plain attention under the mask that the policy stands for."""
    capacity, sink = 9, 2
    text = prompt(length + 12, seed=length)
    cache = attach(llama, make_artifact(llama, capacity, sink=sink)).new_cache()
    got = [llama(text[:, :length], past_key_values=cache).logits[:, -1]]
    got += [llama(text[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(length, text.shape[1])]

    n = text.shape[1]
    query, key = torch.arange(n)[:, None], torch.arange(n)
    kept = (key < sink) | (key > query - (capacity - sink))
    mask = (key <= query) & (kept | (query < length))  # the prompt's own attention is exact
    want = llama(text, attention_mask=mask.view(1, 1, n, n)).logits[0, length - 1 :]
    torch.testing.assert_close(torch.cat(got), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_left_padding_changes_nothing(any_model, make_artifact, policy) -> None:
    artifact = make_artifact(any_model, 9, policy=policy, recent=4)
    kv = attach(any_model, artifact)
    prompts = [prompt(n, seed=n)[0] for n in (33, 7, 21)]
    alone = [greedy(any_model, kv.new_cache(), p[None])[0, len(p) :] for p in prompts]
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.int64), p]) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()
    together = greedy(any_model, kv.new_cache(3), ids, attention_mask=mask)[:, width:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("policy", POLICIES)
def test_left_padding_with_a_follow_up(llama, make_artifact, policy) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=4))
    turns = [(prompt(30, 1), prompt(6, 2)), (prompt(12, 3), prompt(4, 4))]
    alone = []
    for first, second in turns:
        cache = kv.new_cache()
        llama(first, past_key_values=cache)
        llama(second, past_key_values=cache)
        alone.append(llama(prompt(1), past_key_values=cache).logits[0, -1])

    def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(r.shape[1] for r in rows)
        ids = torch.cat([torch.nn.functional.pad(r, (width - r.shape[1], 0)) for r in rows])
        return ids, torch.stack([torch.arange(width) >= width - r.shape[1] for r in rows]).long()

    cache = kv.new_cache(2)
    ids, mask = padded([first for first, _ in turns])
    llama(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    ids, more = padded([second for _, second in turns])
    mask = torch.cat([mask, more], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    llama(ids, attention_mask=mask, position_ids=positions[:, -ids.shape[1] :], past_key_values=cache)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
    last = llama(
        prompt(1).expand(2, 1), attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1, past_key_values=cache
    )
    torch.testing.assert_close(last.logits[:, -1], torch.stack(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fork_is_independent(llama, make_artifact, policy) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=3))
    cache = kv.new_cache()
    llama(prompt(40), past_key_values=cache)
    fork, other = copy.deepcopy(cache), copy.deepcopy(cache)
    for t in range(12):
        llama(prompt(1, seed=t), past_key_values=other)
    a = llama(prompt(5, 9), past_key_values=cache).logits
    b = llama(prompt(5, 9), past_key_values=fork).logits
    assert torch.equal(a, b)
    assert fork.nbytes == cache.nbytes
    assert not {t.data_ptr() for t in fork.tensors()} & {t.data_ptr() for t in cache.tensors()}


def test_beam_search_of_a_full_target_equals_plain_beam_search(llama, make_artifact) -> None:
    options = {"num_beams": 4, "max_new_tokens": 20, "do_sample": False}
    plain = llama.generate(prompt(30), **options)
    kv = attach(llama, make_artifact(llama))
    for batch in (4, 1):  # an empty cache follows the batch of its first prompt
        assert torch.equal(llama.generate(prompt(30), past_key_values=kv.new_cache(batch), **options), plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_reordering_sequences(llama, make_artifact, policy) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=3))
    cache = kv.new_cache(3)
    ids = prompt(30, batch=3)
    llama(ids, past_key_values=cache)
    fork = copy.deepcopy(cache)
    fork.reorder_cache(torch.tensor([2, 0, 0]))
    step = prompt(1, batch=3)
    want = llama(step[[2, 0, 0]], past_key_values=cache_at(cache, [2, 0, 0])).logits
    torch.testing.assert_close(llama(step[[2, 0, 0]], past_key_values=fork).logits, want)
    selected = llama(step, past_key_values=cache).logits[[2, 0, 0]]
    torch.testing.assert_close(want, selected, atol=1e-5, rtol=1e-5)


def cache_at(cache, indices: list[int]):
    fork = copy.deepcopy(cache)
    fork.batch_select_indices(torch.tensor(indices))
    return fork


@pytest.mark.parametrize("policy", POLICIES)
def test_several_tokens_see_the_cache_and_each_other(any_model, make_artifact, policy) -> None:
    """While nothing has to be evicted, a follow-up in one piece equals one token after the other."""
    kv = attach(any_model, make_artifact(any_model, 20, policy=policy, recent=8))
    whole, single = kv.new_cache(), kv.new_cache()
    for cache in (whole, single):
        any_model(prompt(8), past_key_values=cache)
    follow = prompt(6, 5)
    a = any_model(follow, past_key_values=whole).logits
    b = torch.cat([any_model(follow[:, t : t + 1], past_key_values=single).logits for t in range(6)], dim=1)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    a, b = (any_model(prompt(1), past_key_values=cache).logits for cache in (whole, single))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_follow_up_longer_than_the_budget(llama, make_artifact, policy) -> None:
    cache = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=3)).new_cache()
    for length in (3, 60, 2, 1, 30):
        assert llama(prompt(length), past_key_values=cache).logits.isfinite().all()
    assert [layer.store.seen for layer in cache.layers] == [[96]] * 3


def test_misuse_is_refused_in_one_sentence(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, 9))
    cache = kv.new_cache()
    llama(prompt(20), past_key_values=cache)
    with pytest.raises(CacheError, match="cropped"):
        cache.crop(-1)
    with pytest.raises(CacheError, match="1 sequences"):
        llama(prompt(1, batch=2), past_key_values=cache)
    with pytest.raises(CacheError, match="batch of 0"):
        kv.new_cache(0)
