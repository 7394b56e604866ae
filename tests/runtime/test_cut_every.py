"""Prompts that are cut to the budget on the way, against pieces that a caller reads one after the other."""

from __future__ import annotations

import pytest
import torch

from kvcompile.artifacts import CacheError
from kvcompile.runtime import Decoder, attach, generate

POLICIES = ["recent", "snapkv", "scored", "h2o"]
ROWS = [[20, 9, 5], [5, 40, 9], [9, 5, 20]]
BITS = [(32, 32), (8, 4), (4, 8), (4, 4)]


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("every", [1, 7, 16, 52, 53, 100])
def test_pieces_after_one_another(any_model, make_artifact, policy: str, every: int) -> None:
    if every == 1 and policy != "scored":
        return
    kv = attach(any_model, make_artifact(any_model, 14, policy=policy, recent=5))
    ids, caches = prompt(53), (kv.new_cache(), kv.new_cache())
    decoder = Decoder(any_model, caches[0], prefill_cut_every=every)
    token = decoder.prefill(ids)
    other = Decoder(any_model, caches[1])
    for piece in ids.split(every, 1):
        expected = other.prefill(piece)
    assert torch.equal(token, expected)
    assert torch.equal(decoder.position, other.position)
    assert caches[0].counts() == caches[1].counts()
    for one, two in zip(caches[0].tensors(), caches[1].tensors(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("bits", [(), BITS], ids=["exact", "quantised"])
@pytest.mark.parametrize("policy", POLICIES)
def test_padded_batches_equal_their_sequences_alone(llama, make_artifact, policy: str, bits) -> None:
    """Some of which begin after the first pieces."""
    recent = None if policy == "recent" else 3
    kv = attach(llama, make_artifact(llama, ROWS, policy=policy, recent=recent, bits=bits))
    # No token twice: of equal scores, slots decide, in which the tokens lie in another order.
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(94, generator=generator)[:41] + 3 for _ in range(4)])
    pads, every = [0, 3, 10, 35], 10
    mask = (torch.arange(41) >= torch.tensor(pads)[:, None]).long()
    cache = kv.new_cache(4)
    decoder = Decoder(llama, cache, prefill_chunk=4, prefill_cut_every=every)
    texts = [decoder.prefill(ids, mask), *(decoder.step().clone() for _ in range(6))]
    assert cache.ragged[0].store.seen == [41 - pad + 6 for pad in pads]
    for b, pad in enumerate(pads):
        alone = Decoder(llama, kv.new_cache(), prefill_chunk=4)
        for first in range(0, 41, every):
            if first + every > pad:
                token = alone.prefill(ids[b : b + 1, max(pad, first) : first + every])
        expected = [token, *(alone.step().clone() for _ in range(6))]
        assert [int(t) for t in expected] == [int(t[b]) for t in texts]


def test_a_cut_after_the_end_changes_nothing_and_one_before_does(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy="scored", recent=3))
    texts = [
        generate(llama, kv.new_cache(), prompt(60), max_new_tokens=12, prefill_cut_every=every)
        for every in (None, 60, 10)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_with_room_for_all_nothing_is_lost(llama, make_artifact) -> None:
    """What is cut away is all that the pieces cost."""
    kv = attach(llama, make_artifact(llama))
    texts = [
        generate(llama, kv.new_cache(), prompt(60), max_new_tokens=12, prefill_cut_every=every) for every in (None, 7)
    ]
    assert torch.equal(*texts)


def test_a_follow_up_is_cut_too(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS, policy="scored", recent=3))
    caches = kv.new_cache(), kv.new_cache()
    for cache in caches:
        Decoder(llama, cache).prefill(prompt(30))
    token = Decoder(llama, caches[0]).prefill(prompt(25, 3), prefill_cut_every=10)
    decoder = Decoder(llama, caches[1])
    assert torch.equal(token, [decoder.prefill(piece) for piece in prompt(25, 3).split(10, 1)][-1])


def test_what_cannot_be_cut_is_refused(llama, make_artifact) -> None:
    kv = attach(llama, make_artifact(llama, ROWS))
    with pytest.raises(CacheError, match="a cut every 0 prompt tokens"):
        Decoder(llama, kv.new_cache(), prefill_cut_every=0)
    with pytest.raises(CacheError, match="a cut every -1 prompt tokens"):
        Decoder(llama, kv.new_cache()).prefill(prompt(5), prefill_cut_every=-1)
