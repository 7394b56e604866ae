"""The decode loop: what `model.generate` gives, sampling, endings and streaming."""

from __future__ import annotations

import os

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvcompile.artifacts import CacheError
from kvcompile.runtime import Sampling, attach, generate

BITS = [(32, 32), (8, 4), (4, 8), (4, 4)]
ROWS = [[10, 30, 7], [12, 3, 64], [128, 20, 9]]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("policy", ["recent", "snapkv", "scored", "h2o"])
@pytest.mark.parametrize("bits", [(), BITS], ids=["exact", "rounded"])
def test_greedy_text_is_that_of_generate(llama, make_artifact, policy, bits) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=2, bits=bits))
    ids = prompt(40, batch=3)
    expected = llama.generate(ids, past_key_values=kv.new_cache(3), max_new_tokens=40, do_sample=False)[:, 40:]
    assert torch.equal(generate(llama, kv.new_cache(3), ids, max_new_tokens=40), expected)


def test_every_family_decodes_as_with_generate(any_model, make_artifact) -> None:
    kv = attach(any_model, make_artifact(any_model, capacity=20, recent=3))
    ids = prompt(30, 1)
    expected = any_model.generate(ids, past_key_values=kv.new_cache(), max_new_tokens=12, do_sample=False)[:, 30:]
    assert torch.equal(generate(any_model, kv.new_cache(), ids, max_new_tokens=12), expected)


def test_padded_prompts_give_the_text_of_each_alone(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy="scored", recent=2))
    ids, mask = prompt(33, 2, 2), torch.ones(2, 33, dtype=torch.int64)
    ids[1, :9], mask[1, :9] = 0, 0
    both = generate(llama, kv.new_cache(2), ids, attention_mask=mask, max_new_tokens=20)
    for row, alone in zip(both, (ids[:1], ids[1:, 9:]), strict=True):
        assert torch.equal(row, generate(llama, kv.new_cache(), alone, max_new_tokens=20)[0])


def test_a_follow_up_goes_on_with_the_same_cache(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy="scored", recent=2))
    cache, other = kv.new_cache(), kv.new_cache()
    first = generate(llama, cache, prompt(30), max_new_tokens=5)
    more = prompt(7, 3)
    text = generate(llama, cache, torch.cat([first[:, -1:], more], 1), max_new_tokens=6)
    steps = torch.cat([prompt(30), first], 1)
    llama(steps[:, :30], past_key_values=other)
    for t in range(30, 34):
        llama(steps[:, t : t + 1], past_key_values=other)
    logits = llama(torch.cat([first[:, -1:], more], 1), past_key_values=other).logits[:, -1]
    assert text[0, 0] == logits.argmax(-1)


def test_an_ended_sequence_is_filled_up_and_the_rest_goes_on(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS))
    heard: list[torch.Tensor] = []
    for seed in range(20):
        ids = prompt(20, seed, 2)
        free = generate(llama, kv.new_cache(2), ids, max_new_tokens=12)
        first, other = free.tolist()
        # An ending that only the first sequence reaches, and not at once.
        ends = [i for i in range(1, 11) if first[i] not in first[:i] and first[i] not in other]
        if ends:
            break
    end = ends[0]
    text = generate(llama, kv.new_cache(2), ids, max_new_tokens=12, eos=[first[end]], pad=1, on_token=heard.append)
    assert text[0].tolist() == [*first[: end + 1], *[1] * (11 - end)]
    assert text[1].tolist() == other
    assert torch.equal(torch.stack(heard, 1), text)
    alone = generate(llama, kv.new_cache(), ids[:1], max_new_tokens=12, eos=[first[end]])
    assert alone.tolist() == [first[: end + 1]]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (2.0, 30, 0.9)]
)
def test_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(Sampling(temperature, top_p, top_k).filtered(logits), expected)


def test_draws_follow_the_weights() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = Sampling(1.0).choose(logits.expand(20_000, -1))
    shares = draws.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=0.015, rtol=0)
    assert set(Sampling(1.0, top_k=2).choose(logits.expand(500, -1)).tolist()) == {1, 2}


def test_what_cannot_be_sampled_or_decoded_is_refused(llama, make_artifact) -> None:
    for temperature in (-1.0, float("nan"), float("inf")):
        with pytest.raises(CacheError, match="expected a finite temperature of at least 0"):
            Sampling(temperature)
    kv = attach(llama, make_artifact(llama, ROWS))
    cache = kv.new_cache(2)
    generate(llama, cache, prompt(9, batch=2), max_new_tokens=1)
    with pytest.raises(CacheError, match="1 prompts for a cache of 2 sequences"):
        generate(llama, cache, prompt(4), max_new_tokens=1)
    with pytest.raises(CacheError, match="0 new tokens were asked for, expected 1 or more"):
        generate(llama, cache, prompt(4, batch=2), max_new_tokens=0)
    with pytest.raises(CacheError, match="prompts of no tokens were given"):
        generate(llama, cache, prompt(0, batch=2), max_new_tokens=1)
    with pytest.raises(CacheError, match=r"a mask of shape \(2, 13\) .* of shape \(2, 4\): a follow-up's mask covers"):
        generate(llama, cache, prompt(4, batch=2), attention_mask=torch.ones(2, 13), max_new_tokens=1)


@pytest.mark.parametrize(("fixture", "tokens"), [("one_layer", 20), ("llama", 8)])
@pytest.mark.parametrize("kernels", ["", "triton"], ids=["C", "triton"])
def test_the_kernels_give_the_text_of_torch(
    request: pytest.FixtureRequest,
    kernels: str,
    fixture: str,
    tokens: int,
    make_artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU, in Triton's interpreter; more tokens than the budgets hold, so that they turn over."""
    if kernels == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("there is a GPU, so Triton compiles for it and takes no tensors of a CPU")
    model = request.getfixturevalue(fixture)
    rows = ROWS[: model.config.num_hidden_layers]
    kv = attach(model, make_artifact(model, rows, policy="scored", recent=2, bits=BITS))
    texts = []
    for implementation in ("torch", kernels):
        monkeypatch.setenv("KVCOMPILE_KERNELS", implementation)
        texts.append(generate(model, kv.new_cache(), prompt(30), max_new_tokens=tokens))
    assert len(set(texts[0][0].tolist())) > 5, "a text that repeats itself shows nothing"
    assert torch.equal(*texts)
