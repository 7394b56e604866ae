"""Values of a prompt's kept tokens, fitted to its own queries."""

from __future__ import annotations

import pytest
import torch
from profiles import with_rotary

from kvcompile.kernels.softmax import PLAIN, Softmax
from kvcompile.runtime import Decoder, attach, filled, read_prompt
from kvcompile.runtime.fitted import RIDGE, fit_head
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.references import HeadReferences


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(length))


def outputs(query, keys, values, scaling, softmax):
    """Attention written out: query [group, r, D], keys and values [n, D]."""
    return softmax.weights((query @ keys.mT * scaling)[None], None)[0] @ values


def fitted(references, keys, values, kept):
    return fit_head(references, references.attended(keys, values).output, keys[kept], values[kept])


SOFTMAX = {
    "plain": lambda group: PLAIN,
    "capped": lambda group: Softmax(cap=2.0),
    "sinks": lambda group: Softmax(sinks=random(group, seed=9)),
}
SHAPES = [(1, 40, 60, 7), (5, 3, 40, 39), (7, 2, 33, 1), (3, 9, 30, 27)]
"""Query heads, queries of each, tokens, kept ones."""


@pytest.mark.parametrize("softmax", SOFTMAX.values(), ids=SOFTMAX)
@pytest.mark.parametrize(("group", "asked", "count", "kept"), SHAPES)
def test_they_are_the_least_squares_solution(group: int, asked: int, count: int, kept: int, softmax) -> None:
    """Whichever of the two systems is smaller: written out in float64."""
    query, keys, values = random(group, asked, 8), random(count, 8, seed=1), random(count, 8, seed=2)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(3))[:kept].sort().values
    of_group = softmax(group)
    found = fitted(HeadReferences(query, 0.5, of_group), keys, values, chosen)
    logits = (query @ keys.mT * 0.5)[None]
    weights = of_group.weights(logits[..., chosen], None)[0].flatten(0, 1).double()
    left = outputs(query, keys, values, 0.5, of_group).flatten(0, 1).double() - weights @ values[chosen].double()
    ridge = RIDGE * group * asked
    stacked = torch.cat([weights, ridge**0.5 * torch.eye(kept, dtype=torch.float64)])
    change = torch.linalg.lstsq(stacked, torch.nn.functional.pad(left, (0, 0, 0, kept))).solution
    torch.testing.assert_close(found.double(), values[chosen].double() + change, atol=2e-3, rtol=2e-3)


def test_a_token_makes_up_for_its_twin() -> None:
    """Two tokens with one key: whichever goes, the other's value becomes the mean of both."""
    keys, values = random(20, 16), random(40, 16, seed=1)
    references = HeadReferences(random(4, 200, 16, seed=2), 1.0, PLAIN)
    found = fitted(references, torch.cat([keys, keys]), values, torch.arange(20))
    torch.testing.assert_close(found, (values[:20] + values[20:]) / 2, atol=0.05, rtol=0.05)


def test_what_was_not_seen_does_not_count() -> None:
    query, keys, values, kept = random(2, 9, 8), random(30, 8, seed=1), random(30, 8, seed=2), torch.arange(5)
    real = torch.arange(9) < 6
    found, other = (
        fitted(HeadReferences(torch.where(real[:, None], query, unseen), 0.5, PLAIN, real), keys, values, kept)
        for unseen in (7.0, -3.0)
    )
    torch.testing.assert_close(found, other)


def stored(cache) -> list[list[torch.Tensor]]:
    """Values by layer and class."""
    return [
        [layer.store.values.read(cls, cls.capacity, torch.float32) for cls in layer.store.layout.classes]
        for layer in cache.ragged
    ]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_it_is_for_evicting_heads_of_the_policy_alone(llama, make_artifact, policy: str) -> None:
    plain = make_artifact(llama, [[14, 90, 14], [90, 14, 90], [14, 14, 14]], policy=policy, recent=3)
    artifact, caches = with_rotary(plain, llama), []
    with attach(llama, plain) as kv:
        without = kv.new_cache()
        Decoder(llama, without).prefill(prompt(53))
    for references in (False, True):
        with attach(llama, artifact, references=references) as kv:
            cache = kv.new_cache()
            Decoder(llama, cache).prefill(prompt(53))
            caches.append((cache, kv.layouts))
    (cache, layouts), (other, _) = caches
    for layer, (one, two) in enumerate(zip(stored(cache), stored(other), strict=True)):
        for cls, a, b in zip(layouts[layer].classes, one, two, strict=True):
            assert torch.equal(a, b) != (cls.policy == "scored" and cls.capacity == 14)
    assert all(map(torch.equal, cache.tensors(), without.tensors())), "without a rotary embedding nothing is asked"
    pairs = zip(cache.ragged, other.ragged, strict=True)
    same = all(torch.equal(one.store.keys.exact, two.store.keys.exact) for one, two in pairs)
    assert same == (policy != "scored"), "they choose tokens too"


@pytest.mark.parametrize("how", ["chunks", "padded", "read before"])
def test_however_a_prompt_is_read(any_model, make_artifact, how: str) -> None:
    artifact = with_rotary(make_artifact(any_model, 14, policy="scored", recent=3), any_model)
    before = read_prompt(any_model, prompt(53))
    if how == "read before" and before is None:
        pytest.skip("a family of which not all is left to read")
    with attach(any_model, artifact) as kv:
        whole = kv.new_cache()
        Decoder(any_model, whole).prefill(prompt(53))
        if how == "read before":
            other = filled(kv, before)
        elif how == "chunks":
            other = kv.new_cache()
            Decoder(any_model, other, prefill_chunk=9).prefill(prompt(53))
        else:
            other = kv.new_cache(2)
            ids, mask = torch.full((2, 80), 5), torch.ones(2, 80, dtype=torch.long)
            ids[0, 27:], mask[0, :27], ids[1] = prompt(53)[0], 0, prompt(80)[0]
            Decoder(any_model, other).prefill(ids, mask)
        for one, two in zip(whole.ragged, other.ragged, strict=True):
            values = two.store.values.exact[:1]
            torch.testing.assert_close(one.store.values.exact, values, atol=2e-2, rtol=2e-2)
