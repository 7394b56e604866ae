"""Values of a prompt's kept tokens, fitted to its own queries."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kvcompile.artifacts import REFERENCES, Artifact, ArtifactError
from kvcompile.kernels.softmax import PLAIN, Softmax
from kvcompile.profile import read_rotary
from kvcompile.runtime import Decoder, attach, filled, read_prompt
from kvcompile.runtime.fitted import RIDGE, References, fit_head, reference_tokens
from kvcompile.runtime.policies import POLICIES
from kvcompile.runtime.rotation import Rotation, layer_rotation


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(length))


def with_rotary(artifact: Artifact, model) -> Artifact:
    rotary = read_rotary(model, artifact.target.context)
    own = {"rotary_frequency": rotary.frequency, "rotary_partner": rotary.partner}
    return dataclasses.replace(artifact, profile={**artifact.profile, **own})


def outputs(query, keys, values, scaling, softmax):
    """Attention written out: query [group, r, D], keys and values [n, D]."""
    return softmax.weights((query @ keys.mT * scaling)[None], None)[0] @ values


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
    found = fit_head(query, keys, values, chosen, 0.5, of_group)
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
    found = fit_head(random(4, 200, 16, seed=2), torch.cat([keys, keys]), values, torch.arange(20), 1.0, PLAIN)
    torch.testing.assert_close(found, (values[:20] + values[20:]) / 2, atol=0.05, rtol=0.05)


def test_what_was_not_seen_does_not_count() -> None:
    query, keys, values, kept = random(2, 9, 8), random(30, 8, seed=1), random(30, 8, seed=2), torch.arange(5)
    real = torch.arange(9) < 6
    found = fit_head(torch.where(real[:, None], query, 7.0), keys, values, kept, 0.5, PLAIN, real)
    other = fit_head(torch.where(real[:, None], query, -3.0), keys, values, kept, 0.5, PLAIN, real)
    torch.testing.assert_close(found, other)


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


def test_turning_is_what_the_model_does(any_model) -> None:
    """Of the same token, further on: its keys, by transformers, are those from before, turned."""
    plan = with_rotary(_plan(any_model), any_model)
    near, far = (_keys_at(any_model, offset) for offset in (0, 37))
    for layer, (before, after) in enumerate(zip(near, far, strict=True)):
        rotation = layer_rotation(plan, layer, torch.device("cpu"))
        turned = rotation.turned(before, torch.full((before.shape[1],), 37))
        torch.testing.assert_close(turned, after, atol=1e-3, rtol=1e-3)


def _plan(model) -> Artifact:
    import tiny_models

    return tiny_models.make_artifact(model, 14, policy="scored", recent=3)


def _keys_at(model, offset: int) -> list[torch.Tensor]:
    """Keys [H, 1, D] of one token at a position, by planned layer: nothing else is seen, so that only it matters."""
    from kvcompile.profile.attention import attended
    from kvcompile.profile.layerwise import Calls, embedded, through
    from kvcompile.profile.linear import switched_off
    from kvcompile.profile.structure import frozen, layers
    from kvcompile.runtime.parts import planned

    found: list[torch.Tensor] = []
    with torch.no_grad(), frozen(model), attended(model):
        hidden, calls = embedded(model, np.array([5])), Calls(model).at(np.array([offset]))
        for layer, arguments in zip(layers(model), calls, strict=True):

            def attend(call, layer=layer):
                if planned(layer):
                    found.append(call.key.float())
                return torch.zeros_like(call.query, dtype=call.value.dtype)

            with switched_off([layer]):
                hidden = through(layer, hidden, arguments, attend)
    return found


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
    for fit_values in (False, True):
        with attach(llama, artifact, fit_values=fit_values) as kv:
            cache = kv.new_cache()
            Decoder(llama, cache).prefill(prompt(53))
            caches.append((cache, kv.layouts))
    (cache, layouts), (other, _) = caches
    for layer, (one, two) in enumerate(zip(stored(cache), stored(other), strict=True)):
        for cls, a, b in zip(layouts[layer].classes, one, two, strict=True):
            assert torch.equal(a, b) != (cls.policy == "scored" and cls.capacity == 14)
    assert all(map(torch.equal, cache.tensors(), without.tensors())), "without a rotary embedding nothing is fitted"
    for one, two in zip(cache.ragged, other.ragged, strict=True):
        assert torch.equal(one.store.keys.exact, two.store.keys.exact), "keys are stored as they are"


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


def test_arrays_that_do_not_fit_are_refused(llama, make_artifact) -> None:
    artifact = with_rotary(make_artifact(llama, 14, policy="scored", recent=3), llama)
    shifted = artifact.profile["rotary_partner"] + 1
    for name, array in (("rotary_frequency", np.zeros((1, 1), np.float32)), ("rotary_partner", shifted)):
        broken = dataclasses.replace(artifact, profile={**artifact.profile, name: array})
        with pytest.raises(ArtifactError, match=r"carries no usable profile\.rotary_frequency and rotary_partner"):
            attach(llama, broken)
    assert layer_rotation(make_artifact(llama, 14), 0, torch.device("cpu")) is None


def test_turns_add_up() -> None:
    frequency = np.array([0.5, 0.1, -0.5, -0.1, 0.0], np.float32)
    rotation = Rotation.of(frequency, np.array([2, 3, 0, 1, 4], np.int32), torch.device("cpu"))
    x, once, more = random(6, 5), torch.arange(6), torch.arange(6) * 3
    torch.testing.assert_close(rotation.turned(rotation.turned(x, once), more), rotation.turned(x, once + more))
    torch.testing.assert_close(rotation.turned(x, once).norm(dim=-1), x.norm(dim=-1))
