"""A token policy and a model family from outside of the package: a call of the registry each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, SHAPE, make_artifact, tiny_model
from transformers import StableLmConfig

from kvcompile.artifacts import POLICIES, STATE_BYTES, ModelError, read, write
from kvcompile.kernels.layout import KINDS
from kvcompile.runtime import attach, policies, reorder
from kvcompile.runtime.policies import Policy, Prompt


class Loudest(Policy):
    """Of a prompt the tokens with the longest keys are kept."""

    def score(self, prompt: Prompt) -> torch.Tensor:
        return prompt.keys.float().norm(dim=-1)


@pytest.fixture
def loudest() -> Iterator[None]:
    policies.register("loudest", Loudest())
    yield
    POLICIES.remove("loudest")
    del STATE_BYTES["loudest"], policies.POLICIES["loudest"], KINDS["loudest"]


@torch.no_grad()
@pytest.mark.usefixtures("loudest")
def test_a_token_policy(tmp_path: Path) -> None:
    """It is in a file by its code, chooses at the prompt, and its heads step as a ring."""
    model = tiny_model(CONFIGS["llama"])
    artifact = make_artifact(model, [[12] * 3] * 3, policy="loudest", recent=4, shuffle=False, context=64)
    write(artifact, tmp_path / "a.kvb")
    assert (read(tmp_path / "a.kvb").budgets.policy == POLICIES.index("loudest")).all()
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    with attach(model, tmp_path / "a.kvb") as kv:
        cache, whole = kv.new_cache(), attach_free_keys(model, ids)
        model(ids, past_key_values=cache)
        store = cache.layers[0].store
        stored = store.keys.read(store.layout.classes[0], 12, torch.float32)[0]
        for head in range(3):
            middle = whole[head, 2:36]
            best = middle[middle.norm(dim=-1).topk(6).indices.sort().values]
            torch.testing.assert_close(stored[head, 2:8], best)
        before = stored.clone()
        for token in range(5):
            model(torch.tensor([[token + 3]]), past_key_values=cache)
        after = store.keys.read(store.layout.classes[0], 12, torch.float32)[0]
        assert torch.equal(after[:, :8], before[:, :8])
        assert (after[:, 8:] != before[:, 8:]).any(-1).all()


def attach_free_keys(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The keys [H, n, D] of the first layer, from transformers' own cache."""
    found: torch.Tensor = model(ids, use_cache=True).past_key_values.layers[0].keys[0]
    return found


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="already"):
        policies.register("scored", Policy())


@torch.no_grad()
def test_a_model_family() -> None:
    """StableLM, which rotates a part of every head, is not among ours."""
    model = tiny_model(StableLmConfig(**SHAPE))
    artifact = make_artifact(model, context=64)
    with pytest.raises(ModelError, match="stablelm"):
        attach(model, artifact)
    reorder.register("stablelm", reorder.split_projections)
    try:
        ids = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(0))
        plain = model(ids).logits
        with attach(model, artifact) as kv:
            cache = kv.new_cache()
            model(ids[:, :20], past_key_values=cache)
            said = model(ids[:, 20:], past_key_values=cache).logits
        torch.testing.assert_close(said, plain[:, 20:], rtol=1e-4, atol=1e-4)
    finally:
        del reorder.ARCHITECTURES["stablelm"]
