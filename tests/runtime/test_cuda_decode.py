"""Decoding on a GPU: a step as one CUDA graph against the same step as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch
from tiny_models import SHAPE, tiny_model
from transformers import LlamaConfig, PreTrainedModel

from kvcompile.runtime import Attachment, Decoder, RaggedCache, Sampling, attach, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROWS = [[10, 64], [33, 7]]
WIDTHS = {
    "16": [(16, 16)],
    "8": [(8, 8)],
    "4": [(4, 4)],
    "mixed": [(16, 8), (8, 4), (4, 16), (4, 8)],
}
CONFIG = LlamaConfig(
    **SHAPE | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model(CONFIG, torch.bfloat16).cuda()


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A recording that fails is a warning, and the text is the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decoding without CUDA graphs")
        yield


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed)).cuda()


def texts(decoder: Decoder, turns: Sequence[tuple[torch.Tensor, torch.Tensor | None]], tokens: int) -> torch.Tensor:
    """What is said after every turn, int64 [B, turns x tokens]."""
    found = []
    for ids, mask in turns:
        found += [decoder.prefill(ids, mask), *(decoder.step().clone() for _ in range(tokens - 1))]
    return torch.stack(found, 1)


def eager(model: PreTrainedModel, cache: RaggedCache, sampling: Sampling | None = None) -> Decoder:
    decoder = Decoder(model, cache, sampling)
    decoder._records = False
    return decoder


def compare(model: PreTrainedModel, kv: Attachment, turns: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
    """More tokens than the budgets hold, so that they turn over."""
    batch = len(turns[0][0])
    graph, plain = Decoder(model, kv.new_cache(batch)), eager(model, kv.new_cache(batch))
    expected = texts(plain, turns, 80)
    assert len(set(expected[0].tolist())) > 8, "a text that repeats itself shows nothing"
    assert torch.equal(texts(graph, turns, 80), expected)
    assert graph.recorded
    assert not plain.recorded
    for one, two in zip(graph.cache.tensors(), plain.cache.tensors(), strict=True):
        assert torch.equal(one, two)
    assert graph.cache.counts() == plain.cache.counts()


@pytest.mark.parametrize("policy", ["recent", "snapkv", "scored"])
@pytest.mark.parametrize("bits", WIDTHS.values(), ids=WIDTHS)
def test_a_graph_says_what_its_steps_say(model, make_artifact, policy, bits) -> None:
    kv = attach(model, make_artifact(model, ROWS, policy=policy, recent=3, dtype="bfloat16", bits=bits))
    compare(model, kv, [(prompt(50), None)])


@pytest.mark.parametrize("bits", WIDTHS.values(), ids=WIDTHS)
def test_unequal_prompts_and_follow_ups(model, make_artifact, bits) -> None:
    kv = attach(model, make_artifact(model, ROWS, policy="scored", recent=3, dtype="bfloat16", bits=bits))
    turns = []
    for seed, (length, padded) in enumerate([(50, 21), (1, 0), (9, 4), (1, 1), (100, 60)]):
        mask = torch.ones(3, length, dtype=torch.int64)
        mask[1, :padded] = 0
        turns.append((prompt(length, seed, 3), mask.cuda()))
    compare(model, kv, turns)


def test_recorded_with_the_second_step(model, make_artifact) -> None:
    kv = attach(model, make_artifact(model, ROWS, policy="scored", recent=3, dtype="bfloat16"))
    decoder = Decoder(model, kv.new_cache())
    decoder.prefill(prompt(20))
    found = [decoder.recorded]
    for _ in range(3):
        decoder.step()
        found.append(decoder.recorded)
    assert found == [False, False, True, True]


def test_the_next_answer_replays_at_once(model, make_artifact, monkeypatch) -> None:
    kv = attach(model, make_artifact(model, ROWS, policy="scored", recent=3, dtype="bfloat16"))
    cache, plain = kv.new_cache(2), eager(model, kv.new_cache(2))
    first = generate(model, cache, prompt(30, 0, 2), max_new_tokens=20)
    graph = cache.recording.graph
    assert graph is not None

    def recorded_again(*_: object) -> None:
        raise AssertionError("recorded again")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", recorded_again)
    second = generate(model, cache, prompt(7, 1, 2), max_new_tokens=20)
    assert cache.recording.graph is graph
    # `generate` stores the last token of neither answer.
    expected = texts(plain, [(prompt(30, 0, 2), None), (prompt(7, 1, 2), None)], 20)
    assert torch.equal(torch.cat([first, second], 1).cpu(), expected.cpu())


def test_every_replay_draws_anew(model, make_artifact) -> None:
    kv = attach(model, make_artifact(model, ROWS, dtype="bfloat16"))
    decoder = Decoder(model, kv.new_cache(64), Sampling(1.5))
    said = texts(decoder, [(prompt(20).expand(64, -1), None)], 8)
    assert decoder.recorded
    assert len({tuple(row) for row in said.tolist()}) > 32
    assert len({tuple(column) for column in said.T.tolist()}) == 8


def test_attention_that_is_learnt_from_is_not_recorded(model, make_artifact) -> None:
    kv = attach(model, make_artifact(model, ROWS, policy="h2o", recent=3, dtype="bfloat16"))
    decoder = Decoder(model, kv.new_cache())
    texts(decoder, [(prompt(30), None)], 10)
    assert not decoder.recorded


def test_a_model_that_asks_the_host_decodes_without_a_graph(model, make_artifact) -> None:
    """And draws, and another can be recorded afterwards."""
    kv = attach(model, make_artifact(model, ROWS, policy="scored", recent=3, dtype="bfloat16"))
    asks = model.model.norm.register_forward_hook(lambda _, args, out: out * (2 if out.sum().item() == 0.125 else 1))
    stream = torch.cuda.current_stream()
    decoder = Decoder(model, kv.new_cache(), Sampling(0.8))
    decoder.prefill(prompt(30))
    decoder.step()
    with pytest.warns(UserWarning, match="decoding without CUDA graphs"):
        decoder.step()
    for _ in range(20):
        decoder.step()
    assert not decoder.recorded
    assert torch.cuda.current_stream() == stream
    assert decoder.cache.layers[0].store.seen == [52]
    asks.remove()
    again = Decoder(model, kv.new_cache(), Sampling(0.8))
    said = texts(again, [(prompt(30), None)], 30)
    assert again.recorded
    assert len(set(said[0].tolist())) > 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu(model, make_artifact) -> None:
    """While the first is the current one."""
    kv = attach(model, make_artifact(model, ROWS, policy="scored", recent=3, dtype="bfloat16"))
    expected = texts(Decoder(model, kv.new_cache()), [(prompt(30), None)], 20)
    kv.detach()
    model.to("cuda:1")
    kv = attach(model, make_artifact(model, ROWS, policy="scored", recent=3, dtype="bfloat16"))
    decoder = Decoder(model, kv.new_cache())
    assert torch.cuda.current_device() == 0
    found = texts(decoder, [(prompt(30).to("cuda:1"), None)], 20)
    assert decoder.recorded
    assert torch.equal(found.to("cuda:0"), expected)
