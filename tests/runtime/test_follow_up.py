"""Follow-ups read in chunks against follow-ups that go through the model at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, tiny_model
from transformers import PreTrainedModel

from kvcompile.artifacts import CacheError
from kvcompile.runtime import Decoder, RaggedCache, attach, generate, new_tokens
from kvcompile.runtime.linear import LinearLayer

POLICIES = ["recent", "snapkv", "scored"]
ROWS = [[20, 9, 5], [5, 40, 9], [9, 5, 20]]
BITS = [(32, 32), (8, 4), (4, 8), (4, 4)]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: torch.Tensor, pads: list[int]) -> torch.Tensor:
    return (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The slots that new tokens were given, by layer and class."""
    found: list[torch.Tensor] = []
    write = new_tokens.write

    def watch(*args: Any) -> None:
        found.append(args[4].slot.clone())
        write(*args)

    monkeypatch.setattr(new_tokens, "write", watch)
    return found


def at_once(model: PreTrainedModel, cache: RaggedCache, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As transformers calls the model, with its masks."""
    seen = torch.tensor(cache.ragged[0].store.seen)[:, None]
    real = torch.ones_like(ids) if mask is None else mask
    positions = (real.cumsum(1) - 1).clamp(min=0) + seen
    whole = None if mask is None else torch.nn.functional.pad(mask, (cache.get_seq_length(), 0), value=1)
    return model(ids, attention_mask=whole, position_ids=positions, past_key_values=cache).logits[:, -1]


@torch.inference_mode()
def check(
    model: PreTrainedModel,
    cache: RaggedCache,
    placed: list[torch.Tensor],
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    chunk: int,
) -> None:
    """Both ways keep the same tokens in the same slots, and give the same logits after the follow-up and a step."""
    fork = copy.deepcopy(cache)
    logits: list[torch.Tensor] = []
    placed.clear()
    expected = [at_once(model, cache, ids, mask)]
    whole = list(placed)
    placed.clear()
    hook = model.register_forward_hook(lambda _, args, out: logits.append(out.logits[:, -1]))
    decoder = Decoder(model, fork, prefill_chunk=chunk)
    token = decoder.prefill(ids, mask)
    assert len(whole) == len(placed) > 0
    assert all(torch.equal(a, b) for a, b in zip(whole, placed, strict=True))
    decoder.step()
    hook.remove()
    expected.append(model(token[:, None], position_ids=decoder.position - 1, past_key_values=cache).logits[:, -1])
    assert cache.counts() == fork.counts()
    for one, two in zip(logits, expected, strict=True):
        # Rounding may end on the other side of a code's edge.
        torch.testing.assert_close(one, two, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_give_what_the_whole_follow_up_gives(any_model, make_artifact, placed, policy: str) -> None:
    """Every family and its windows, with and without padding, after prompts of unequal length."""
    kv = attach(any_model, make_artifact(any_model, 14, policy=policy, recent=5))
    cache = kv.new_cache()
    any_model(prompt(21), past_key_values=cache)
    check(any_model, cache, placed, prompt(53, 1), None, 16)
    cache, ids = kv.new_cache(3), prompt(21, 2, 3)
    Decoder(any_model, cache).prefill(ids, padded(ids, [0, 18, 9]))
    ids = prompt(37, 3, 3)
    check(any_model, copy.deepcopy(cache), placed, ids, None, 7)
    if len(cache.ragged) == len(cache.layers):  # transformers lets padding into states of linear attention
        check(any_model, cache, placed, ids, padded(ids, [30, 0, 36]), 7)


@pytest.mark.parametrize("chunk", [1, 7, 40, 41, 100])
@pytest.mark.parametrize("bits", [(), BITS], ids=["exact", "quantised"])
@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_of_every_length(llama, make_artifact, placed, policy: str, bits, chunk: int) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=3, bits=bits))
    for before in (2, 30):
        cache, ids = kv.new_cache(2), prompt(41, 2, 2)
        Decoder(llama, cache).prefill(prompt(before, 1, 2))
        check(llama, copy.deepcopy(cache), placed, ids, None, chunk)
        check(llama, cache, placed, ids, padded(ids, [36, 3]), chunk)


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("family", ["qwen3-next", "qwen3.5"])
@torch.inference_mode()
def test_padding_leaves_no_mark_on_states_of_linear_attention(family: str, make_artifact, chunk: int) -> None:
    """Of three sequences: one without padding, one that is shorter, and one that does not go on."""
    model = tiny_model(CONFIGS[family])
    contexts, more = prompt(30, 1, 3), prompt(9, 2, 3)
    alone = [model(torch.cat([contexts[b], more[b, pad:]])[None]).logits[0, -1] for b, pad in ((0, 0), (1, 5))]
    with attach(model, make_artifact(model)) as kv:
        decoder, found = Decoder(model, kv.new_cache(3), prefill_chunk=chunk), list[torch.Tensor]()
        decoder.prefill(contexts)
        states = [layer for layer in decoder.cache.layers if isinstance(layer, LinearLayer)]
        before = [state[2].clone() for layer in states for state in layer.tensors()]
        hook = model.register_forward_hook(lambda _, args, out: found.append(out.logits[:, -1]))
        decoder.prefill(more, padded(more, [0, 5, 9]))
        hook.remove()
        after = [state[2] for layer in states for state in layer.tensors()]
    torch.testing.assert_close(found[0][:2], torch.stack(alone), atol=1e-4, rtol=1e-3)
    assert all(map(torch.equal, before, after))


def test_hybrid_models_take_no_padded_follow_ups_at_once(make_artifact) -> None:
    model = tiny_model(CONFIGS["qwen3-next"])
    with attach(model, make_artifact(model, 20, policy="h2o", recent=3)) as kv:
        decoder = Decoder(model, kv.new_cache(2))
        decoder.prefill(prompt(30, 1, 2))
        with pytest.raises(CacheError, match="one sequence at a time"):
            decoder.prefill(prompt(9, 2, 2), padded(prompt(9, 2, 2), [0, 5]))


def test_a_pass_that_was_interrupted_is_not_gone_on_from(llama, make_artifact, monkeypatch) -> None:
    with attach(llama, make_artifact(llama, ROWS)) as kv:
        decoder = Decoder(llama, kv.new_cache())
        with monkeypatch.context() as patched:
            patched.setattr(llama.model.layers[1].mlp, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                decoder.prefill(prompt(30))
        with pytest.raises(CacheError, match=r"reset\(\)"):
            decoder.prefill(prompt(30))
        decoder.cache.reset()
        found = decoder.prefill(prompt(30))
        assert torch.equal(found, Decoder(llama, kv.new_cache()).prefill(prompt(30)))


def test_a_policy_that_observes_gets_follow_ups_whole(llama, make_artifact, placed) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy="h2o", recent=3))
    cache, ids = kv.new_cache(2), prompt(20, 2, 2)
    Decoder(llama, cache).prefill(prompt(30, 1, 2))
    check(llama, copy.deepcopy(cache), placed, ids, None, 7)
    check(llama, cache, placed, ids, padded(ids, [12, 0]), 7)


@pytest.mark.parametrize("policy", [*POLICIES, "h2o"])
def test_one_column_that_is_padding_for_some(llama, make_artifact, policy: str) -> None:
    """It is no step for them."""
    kv = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=3))
    cache = kv.new_cache(2)
    decoder = Decoder(llama, cache)
    decoder.prefill(prompt(30, 1, 2))
    decoder.prefill(prompt(1, 2, 2), torch.tensor([[0], [1]]))
    assert cache.ragged[0].store.seen == [30, 31]


def test_generate_goes_on_from_a_filled_cache(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy="scored", recent=3))
    texts = []
    for chunk in (None, 4):
        cache = kv.new_cache()
        generate(llama, cache, prompt(30), max_new_tokens=2)
        texts.append(generate(llama, cache, prompt(25, 4), max_new_tokens=8, prefill_chunk=chunk))
    assert torch.equal(*texts)


def test_another_batch_is_refused_and_an_error_leaves_the_model_as_it_was(llama, make_artifact, monkeypatch) -> None:
    kv = attach(llama, make_artifact(llama, ROWS))
    cache = kv.new_cache()
    decoder = Decoder(llama, cache, prefill_chunk=8)
    decoder.prefill(prompt(30))
    with pytest.raises(CacheError, match="2 prompts for a cache of 1"):
        decoder.prefill(prompt(9, batch=2))
    before = [dict(vars(layer)) for layer in llama.model.layers]
    monkeypatch.setattr(new_tokens, "keep", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decoder.prefill(prompt(9))
    assert [dict(vars(layer)) for layer in llama.model.layers] == before
    assert all(layer.prompt is None for layer in cache.layers)
