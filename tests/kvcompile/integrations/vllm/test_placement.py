"""Heads in the order of their ranks: the model stays what it was, and every rank finds its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, make_artifact, tiny_model
from transformers import GPT2Config, PreTrainedModel

from kvcompile.artifacts import Artifact, ModelError, planned_heads
from kvcompile.assemble.placement import place
from kvcompile.integrations.vllm.placement import head_orders, placed
from kvcompile.runtime.parts import attention_modules
from kvcompile.runtime.reorder import ARCHITECTURES

IDS = torch.arange(3, 43).remainder(97).view(1, -1)


def on_ranks(model: PreTrainedModel, ranks: int) -> Artifact:
    artifact = make_artifact(model, 9)
    size = np.random.default_rng(0).integers(100, 200, artifact.budgets.capacity.shape)
    return dataclasses.replace(artifact, rank=place(size, ranks).rank)


def test_every_architecture_is_tested() -> None:
    assert {config.model_type for config in CONFIGS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma4-shared"])  # Gemma-4 is refused in vLLM
def test_a_placed_model_computes_what_it_did(name: str) -> None:
    model = tiny_model(CONFIGS[name])
    plain = model(IDS).logits
    (heads, _), rng = planned_heads(CONFIGS[name]), np.random.default_rng(2)
    orders = [rng.permutation(heads).tolist() for _ in attention_modules(model)]
    weights = model.state_dict()
    moved = dict(placed(weights.items(), orders, model.config))
    assert list(moved) == list(weights)
    mine = [f"layers.{module.layer_idx}." for module in attention_modules(model)]
    own = {key for key in weights if "self_attn" in key and any(layer in key for layer in mine)}
    projections = {key for key in own if "_proj." in key and "o_proj.bias" not in key}
    if name.startswith("olmo"):  # one norm over all heads
        projections |= {key for key in weights if "self_attn" in key and "_norm." in key}
    projections |= {key for key in weights if key.endswith(".sinks")}
    for key, tensor in moved.items():
        assert (tensor is weights[key]) == (key not in projections), key
    if heads > 1:
        assert any(not torch.equal(moved[key], weights[key]) for key in projections)
    other = tiny_model(CONFIGS[name])
    other.load_state_dict(moved)
    torch.testing.assert_close(other(IDS).logits, plain)


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_a_rank_s_slice_has_its_heads(ranks: int) -> None:
    model = tiny_model(CONFIGS["multi-head"])
    artifact = on_ranks(model, ranks)
    orders = head_orders(artifact, ranks)
    assert orders is not None
    weights, dim = model.state_dict(), artifact.model.head_dim
    moved = dict(placed(weights.items(), orders, model.config))
    for layer, row in enumerate(artifact.rank):
        for name in ("q_proj", "k_proj", "v_proj"):
            key = f"model.layers.{layer}.self_attn.{name}.weight"
            of_rank = moved[key].chunk(ranks)
            for rank in range(ranks):
                own = [weights[key][h * dim : (h + 1) * dim] for h in np.flatnonzero(row == rank)]
                assert torch.equal(of_rank[rank], torch.cat(own))


def test_query_heads_go_with_their_kv_head() -> None:
    model = tiny_model(CONFIGS["llama"])  # two query heads of 8 elements for each of three KV heads
    key = "model.layers.0.self_attn.{}.weight"
    moved = dict(placed(model.state_dict().items(), [[2, 0, 1]] * 3, model.config))
    query, output = (model.state_dict()[key.format(name)] for name in ("q_proj", "o_proj"))
    assert torch.equal(moved[key.format("q_proj")][:16], query[32:48])
    assert torch.equal(moved[key.format("o_proj")][:, 16:32], output[:, :16])


def test_no_placement_or_one_on_other_ranks() -> None:
    model = tiny_model(CONFIGS["multi-head"])
    assert head_orders(make_artifact(model, 9), 2) is None
    artifact = on_ranks(model, 2)
    assert head_orders(artifact, 3) is None
    assert head_orders(artifact, 4) is None
    assert head_orders(artifact, 1) is None
    uneven = np.tile(np.array([0, 0, 0, 0, 1, 1], np.int32), (3, 1))
    assert head_orders(dataclasses.replace(artifact, rank=uneven), 2) is None
    assert head_orders(on_ranks(model, 1), 1) == [[0, 1, 2, 3, 4, 5]] * 3


def test_tensors_come_one_at_a_time() -> None:
    model = tiny_model(CONFIGS["llama"])
    drawn: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in model.state_dict().items():
            drawn.append(name)
            yield name, tensor

    for count, (name, _) in enumerate(placed(weights(), [[2, 0, 1]] * 3, model.config), start=1):
        assert len(drawn) == count
        assert drawn[-1] == name


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("k_proj.qweight", torch.zeros(48, 3, dtype=torch.int32)),
        ("k_proj.scales", torch.zeros(1, 24)),
        ("o_proj.qzeros", torch.zeros(1, 6, dtype=torch.int32)),
        ("q_proj.weight_scale_inv", torch.zeros(1, 1)),
        ("v_proj.weight", torch.zeros(24, 24, dtype=torch.uint8)),
        ("v_proj.weight", torch.zeros(24, 48).to(torch.float8_e4m3fn)),
        ("v_proj.weight", torch.zeros(12, 48)),
        ("o_proj.weight", torch.zeros(48)),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.dtype),
)
def test_packed_and_quantised_projections_are_refused(name: str, tensor: torch.Tensor) -> None:
    weights = [(f"model.layers.1.self_attn.{name}", tensor)]
    with pytest.raises(
        ModelError, match=f"{name}.*give an unquantised checkpoint .* or build the artifact without --tp"
    ):
        list(placed(weights, [[2, 0, 1]] * 3, CONFIGS["llama"]))


def test_names_that_do_not_come_are_refused_at_the_end() -> None:
    model = tiny_model(CONFIGS["llama"])
    weights = [(f"language_{name}", tensor) for name, tensor in model.state_dict().items()]
    with pytest.raises(ModelError, match=r"has no model\.layers\.0\.self_attn\.k_proj"):
        list(placed(weights, [[2, 0, 1]] * 3, model.config))


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ModelError, match="heads of a 'gpt2' model"):
        list(placed([], [[0]], GPT2Config(n_layer=1, n_head=1)))
