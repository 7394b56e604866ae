"""Reference queries of a prompt, and what they say of its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcompile.artifacts import REFERENCES
from kvcompile.kernels import HeadSpec, LayerLayout
from kvcompile.kernels.softmax import PLAIN, Softmax
from kvcompile.runtime.layer_prompt import LayerPrompt
from kvcompile.runtime.references import LEAST, HeadReferences, References, reference_tokens, referred_heads
from kvcompile.runtime.rotation import Rotation


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SOFTMAX = {
    "plain": lambda group: PLAIN,
    "capped": lambda group: Softmax(cap=2.0),
    "sinks": lambda group: Softmax(sinks=random(group, seed=9)),
}


@pytest.mark.parametrize("softmax", SOFTMAX.values(), ids=SOFTMAX)
@pytest.mark.parametrize(("group", "asked", "count"), [(1, 40, 60), (5, 3, 1), (7, 30, 33)])
def test_scores_are_written_out(group: int, asked: int, count: int, softmax, monkeypatch) -> None:
    """Half the scorer's, half what the queries that were seen pay; however many queries go through at once."""
    query, keys, score = random(group, asked, 8), random(count, 8, seed=1), random(count, seed=2)
    values = random(count, 4, seed=3)
    real, of_group = torch.arange(asked) < max(asked - 2, 1), softmax(group)
    weights = of_group.weights((query[:, real] @ keys.mT * 0.5)[None], None)[0]
    attention = (weights.square().sum((0, 1)) / (group * asked)).sqrt().clamp_min(LEAST).log()
    expected = (score + attention) / 2
    references = HeadReferences(query, 0.5, of_group, real)
    for at_once in (1, 10**6):
        monkeypatch.setattr("kvcompile.runtime.references.MASK_ELEMENTS", at_once)
        attended = references.attended(keys, values)
        torch.testing.assert_close(attended.output[:, real], weights @ values)
        found = attended.scores(score)
        torch.testing.assert_close(found - found.mean(), expected - expected.mean(), atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found.mean(), score.mean(), atol=2e-3, rtol=2e-3)


def test_what_is_asked_for_stays() -> None:
    """A token that all references look at stays, whatever the scorer says of it."""
    keys, score = torch.nn.functional.normalize(random(50, 8), dim=-1), torch.zeros(50)
    score[17] = -5.0
    references = HeadReferences(20 * keys[17].expand(2, 30, 8), 1.0, PLAIN)
    assert references.attended(keys, keys).scores(score).argmax() == 17


@pytest.mark.parametrize("group", [1, 5, 7])
def test_references_are_spread_over_every_prompt(group: int) -> None:
    token = reference_tokens(torch.tensor([2000, 31]), group)
    assert token.shape == (2, -(-REFERENCES // group))
    assert (token >= 0).all()
    assert (token.amax(1) < torch.tensor([2000, 31])).all()
    assert set(token[1].tolist()) == set(range(31)) or token.shape[1] < 31 * 2
    steps = token[0].diff()
    assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_references_are_the_same_in_chunks(chunk: int) -> None:
    query, lengths = random(2, 6, 50, 4), torch.tensor([50, 50])
    whole = References.none_yet(query, 3, lengths).seen(query, torch.zeros(2, dtype=torch.long))
    found = References.none_yet(query, 3, lengths)
    for first in range(0, 50, chunk):
        found = found.seen(query[:, :, first : first + chunk], torch.full((2,), first))
    assert torch.equal(found.query, whole.query)
    index = whole.token[0]
    assert torch.equal(whole.query, query[:, :, index])


def test_of_a_prompt_that_ended_early_those_count_that_were_seen() -> None:
    layout = LayerLayout.from_heads([HeadSpec("scored", 12, 2, 4)] * 2)
    query, keys, values = random(1, 4, 60, 8), random(1, 2, 60, 8, seed=1), random(1, 2, 60, 8, seed=2)
    rotation = Rotation.of(np.zeros(8, np.float32), np.arange(8, dtype=np.int32), torch.device("cpu"))
    for read in (60, 40):
        prompt = LayerPrompt(layout, 60, None, keep_references=True)
        prompt.add(*(side[:, :, :read] for side in (query, keys, values)), 0.5, random(1, read, 2))
        heads = list(referred_heads(prompt.ended(), rotation))
        assert len(heads) == 2
        token = reference_tokens(torch.tensor([60]), 2)[0]
        seen = token < read
        for one in heads:
            real = torch.ones(len(token), dtype=torch.bool) if one.references.real is None else one.references.real
            assert torch.equal(real, seen)
            rows = slice(2 * one.head, 2 * one.head + 2)
            expected = HeadReferences(query[0, rows][:, token[seen]], 0.5, PLAIN)
            expected = expected.attended(keys[0, one.head, :read], values[0, one.head, :read])
            torch.testing.assert_close(one.attended.output[:, seen], expected.output)
            share = (seen.sum() / len(seen)).sqrt()
            torch.testing.assert_close(one.attended.weights, expected.weights * share)
