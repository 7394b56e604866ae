"""The scored policy: what is kept, however the tokens came."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.kernels import HeadSpec, LayerLayout
from kvcompile.runtime import attach
from kvcompile.runtime.follow_up import FollowUpAtOnce
from kvcompile.runtime.store import LayerStore

BITS = [(32, 32), (8, 4), (4, 8), (4, 4)]
ROWS = [[10, 30, 7], [12, 3, 64], [128, 20, 9]]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def kept(scores: list[float], capacity: int, sink: int, recent: int) -> set[int]:
    """Tokens that are there after `scores` came one by one, by the policy's definition."""
    held: list[int] = []
    for token in range(len(scores)):
        held.append(token)
        if len(held) > capacity:
            newest = set(held[-recent:])
            free = [t for t in held if t >= sink and t not in newest]
            # Of equal ones the last token goes, also where it is the one that leaves the ring.
            held.remove(min(free, key=lambda t: (scores[t], -t)) if free else held[-recent - 1])
    return set(held)


@settings(max_examples=80, deadline=None)
@given(
    capacity=st.integers(1, 12),
    sink=st.integers(0, 3),
    recent=st.integers(1, 12),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    every=st.sampled_from([0, 2, 7]),
    seed=st.integers(0, 10_000),
)
def test_pieces_of_any_size_leave_the_same_tokens(
    capacity: int, sink: int, recent: int, pieces: list[int], every: int, seed: int
) -> None:
    """Where no two scores are equal, and where all are one of two numbers."""
    sink = min(sink, capacity - 1)
    check_pieces(capacity, sink, min(recent, capacity - sink), pieces, every, seed)


@pytest.mark.parametrize("pieces", [[60], [1] * 60, [30, *[1] * 30], [5, 25, *[1] * 10, 20], [20, 1, 9, *[1] * 30]])
@pytest.mark.parametrize("every", [7, 20, 100])
def test_of_equal_scores_those_of_the_earlier_tokens_stay(pieces: list[int], every: int) -> None:
    for seed in range(5):
        check_pieces(12, 1, 3, pieces, every, seed)


def check_pieces(capacity: int, sink: int, recent: int, pieces: list[int], every: int, seed: int) -> None:
    """That a head keeps what it is to keep, if it gets so many tokens at a time. Scores all differ, or, where `every`
    is not 0, every so many-th is high and the others are equally low."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(pieces)
    # Distinct also in half precision.
    scores = torch.stack([torch.randperm(total, generator=generator).float() - 5 for _ in range(2)])
    if every:
        scores = (scores % every == 0).float()
    layout = LayerLayout.from_heads([HeadSpec("scored", capacity, sink, recent)] * 2)
    store = LayerStore(layout, 4, torch.float32, torch.device("cpu"), 1)
    number = torch.arange(total).float().view(1, 1, -1, 1).expand(1, 2, total, 4) + 1
    start = 0
    for index, piece in enumerate(pieces):
        now = slice(start, start + piece)
        tokens, score = number[:, :, now], scores[:, now].mT[None]
        query = torch.zeros(1, 2, piece, 4)
        if index == 0:
            store.prefill(query, tokens, tokens, None, 1.0, score)
        elif piece == 1:
            store.step(query, tokens, tokens, 1.0, score)
        else:
            FollowUpAtOnce(store, query, tokens, tokens, None, None, 1.0, score).end()
        start += piece
    view = store.keys.views(layout.classes[0])[0]
    for head in range(2):
        held = view[0, head, :, 0].tolist()
        tokens_held = {int(value) - 1 for value in held if value > 0}
        assert tokens_held == kept(scores[head].tolist(), capacity, sink, recent)
        for slot, value in enumerate(held):
            if value > 0:
                assert store.state[0][0][0, head, slot] == scores[head, int(value) - 1].half()


@pytest.mark.parametrize("bits", [(), BITS], ids=["exact", "rounded"])
def test_a_model_decodes_in_place_and_within_its_bytes(llama, make_artifact, bits) -> None:
    artifact = make_artifact(llama, ROWS, policy="scored", recent=2, bits=bits)
    kv = attach(llama, artifact)
    cache = kv.new_cache()
    assert cache.nbytes == artifact.bytes.resident
    llama(prompt(60), past_key_values=cache)
    places = [tensor.data_ptr() for tensor in cache.tensors()]
    for t in range(100):
        llama(prompt(1, seed=t), past_key_values=cache)
    llama(prompt(9), past_key_values=cache)
    assert [tensor.data_ptr() for tensor in cache.tensors()] == places
    assert cache.nbytes == artifact.bytes.resident


@pytest.mark.parametrize("bits", [(), BITS], ids=["exact", "rounded"])
def test_a_left_padded_batch_equals_its_prompts_alone(llama, make_artifact, bits) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy="scored", recent=2, batch=2, bits=bits))
    short, long = prompt(25, 1), prompt(40, 2)
    padded = torch.cat([torch.cat([torch.zeros(1, 15, dtype=torch.int64), short], 1), long])
    mask = torch.ones_like(padded)
    mask[0, :15] = 0
    options = {"max_new_tokens": 12, "do_sample": False}
    both = llama.generate(padded, attention_mask=mask, past_key_values=kv.new_cache(2), **options)
    for row, alone in zip(both, (short, long), strict=True):
        expected = llama.generate(alone, past_key_values=kv.new_cache(1), **options)
        assert torch.equal(row[-12:], expected[0, -12:])


def test_a_follow_up_at_once_equals_its_tokens_one_by_one(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy="scored", recent=2))
    cache = kv.new_cache()
    llama(prompt(50), past_key_values=cache)
    other = copy.deepcopy(cache)
    # Hidden states of later layers depend on what earlier ones had evicted, so the first layer alone is compared.
    more = prompt(7, 5)
    llama(more, past_key_values=cache)
    for t in range(7):
        llama(more[:, t : t + 1], past_key_values=other)
    for one, two in zip(cache.layers[0].store.state, other.layers[0].store.state, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a.sort(-1).values, b.sort(-1).values, atol=2e-2, rtol=0)


def test_the_best_tokens_of_a_prompt_stay(llama, make_artifact) -> None:
    artifact = make_artifact(llama, [[20] * 3] * 3, policy="scored", recent=4, shuffle=False)
    kv = attach(llama, artifact)
    seen = {}
    hook = llama.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=kwargs["hidden_states"]), with_kwargs=True
    )
    cache = kv.new_cache()
    llama(prompt(70), past_key_values=cache)
    hook.remove()
    scorer = artifact.scorer
    score = seen["x"][0] @ torch.tensor(scorer.weight[1]).float().mT + torch.tensor(scorer.bias[1])
    middle = score.half()[2:66].T.sort(-1, descending=True).values[:, :14]
    held = cache.layers[1].store.state[0][0][0, :, 2:16]
    torch.testing.assert_close(held.sort(-1, descending=True).values, middle, atol=2e-3, rtol=0)
