"""A model split by heads over three processes: what it says, and what each of them holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensor_parallel
import torch
from tiny_models import CONFIGS, SHAPE, configs, make_artifact, tiny_model

from kvcompile.artifacts import DTYPE_BITS, Artifact, ModelError, head_bytes, write
from kvcompile.runtime.tensor_parallel import TensorParallel, check_ranks, permute, placed_on

RANKS = 3
FAMILIES = configs({**SHAPE, "vocab_size": 99, "intermediate_size": 72, "num_key_value_heads": 6}, 16, 36)
ROWS = [[10, 30, 7, 9, 25, 60], [12, 3, 64, 20, 20, 5], [128, 20, 9, 40, 6, 11]]
BITS = [(32, 32), (8, 4), (4, 8), (4, 4), (3, 2)]
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "full": ("llama", {}, False),
    "recent": ("llama", {"capacity": ROWS}, True),
    "recent, unplaced": ("qwen3", {"capacity": ROWS}, False),
    "scored": ("llama", {"capacity": ROWS, "policy": "scored", "recent": 2}, True),
    "quantised": ("qwen3", {"capacity": ROWS, "policy": "scored", "recent": 2, "bits": BITS}, True),
    "quantised, unplaced": ("llama", {"capacity": ROWS, "policy": "scored", "recent": 2, "bits": BITS}, False),
    "bfloat16": ("llama", {"capacity": ROWS, "dtype": "bfloat16", "bits": [(16, 16), (8, 4)]}, True),
    "sliding": ("gemma3", {"capacity": ROWS, "policy": "snapkv"}, True),
    "h2o": ("llama", {"capacity": ROWS, "policy": "h2o"}, True),
}
"""Family, options of the artifact, and whether it places its heads on the ranks."""
REFUSED: dict[str, tuple[str, int | None, str]] = {
    "projections of all heads": ("phi3", None, "a 'phi3' model is not split by heads here (its plan has no style for"),
    "norms of all heads": ("olmo2", RANKS, "is not split by heads here (its plan has colwise_gather_output for"),
    "placed otherwise": ("llama", 2, "does not place 2 of 6 KV heads on each of 3 ranks, as the model has them: build"),
}
"""Family, ranks that the artifact places its heads on, and a part of the sentence."""


def on_ranks(artifact: Artifact, ranks: int) -> Artifact:
    """The artifact with its heads placed on so many ranks, in a way of its own in every layer, and in no order that the
    storage follows."""
    rng, shape = np.random.default_rng(5), artifact.budgets.capacity.shape
    rank = np.array([rng.permutation(np.arange(shape[1]) % ranks) for _ in range(shape[0])], np.int32)
    return dataclasses.replace(artifact, rank=rank)


def bytes_by_rank(artifact: Artifact) -> list[int]:
    size = head_bytes(artifact.budgets, artifact.model.head_dim, DTYPE_BITS[artifact.target.dtype])
    rank = artifact.rank
    if rank is None:  # transformers' blocks
        rank = np.broadcast_to(np.arange(size.shape[1]) * RANKS // size.shape[1], size.shape)
    return [int(size[rank == one].sum()) for one in range(RANKS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def artifacts(folder: Path) -> dict[str, Artifact]:
    """By case; files of them and of the models are in the folder."""
    wanted = {name: (family, options, RANKS if placed else None) for name, (family, options, placed) in CASES.items()}
    wanted |= {name: (family, {"capacity": 9}, ranks) for name, (family, ranks, _) in REFUSED.items()}
    found = {}
    for name, (family, options, ranks) in wanted.items():
        model = tiny_model(FAMILIES[family])
        model.save_pretrained(folder / family)
        artifact = make_artifact(model, **options)
        found[name] = artifact if ranks is None else on_ranks(artifact, ranks)
        write(found[name], folder / f"{name}.kvb")
    return found


@pytest.fixture(scope="module")
def ranks(folder: Path, artifacts: dict[str, Artifact]) -> list[dict[str, Any]]:
    """What each of three processes found, by case."""
    families = {name: case[0] for name, case in (CASES | REFUSED).items()}
    cases = {name: (folder / families[name], folder / f"{name}.kvb") for name in artifacts}
    return tensor_parallel.run(folder, cases, "gloo", [""] * RANKS)


@pytest.mark.parametrize("name", CASES)
def test_three_processes_say_what_one_does(name: str, artifacts: dict[str, Artifact], ranks: list[Any]) -> None:
    with torch.no_grad():
        alone = tensor_parallel.answers(tiny_model(FAMILIES[CASES[name][0]]), artifacts[name])
    # Sums over ranks are rounded in another order, and a number at the border of two codes may get the other one.
    allowed = 5e-3 if "bits" in CASES[name][1] else 1e-3
    for rank in ranks:
        found = rank[name]
        for logits, expected in zip(found["logits"], alone["logits"], strict=True):
            torch.testing.assert_close(logits, expected, atol=allowed, rtol=0)
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        assert torch.equal(found["chunked"], alone["chunked"])
        assert torch.equal(found["generated"], alone["generated"])


@pytest.mark.parametrize("name", CASES)
def test_every_rank_holds_its_heads_alone(name: str, artifacts: dict[str, Artifact], ranks: list[Any]) -> None:
    expected, target = bytes_by_rank(artifacts[name]), artifacts[name].target
    assert [rank[name]["bytes"] for rank in ranks] == [rank[name]["bytes at the end"] for rank in ranks] == expected
    assert sum(expected) == artifacts[name].bytes.resident // target.batch


@pytest.mark.parametrize("name", CASES)
def test_detach_gives_every_rank_its_weights_back(name: str, ranks: list[Any]) -> None:
    assert all(rank[name]["restored"] for rank in ranks)


@pytest.mark.parametrize("name", CASES)
def test_ranks_with_seeds_of_their_own_draw_the_same(name: str, ranks: list[Any]) -> None:
    assert all(torch.equal(rank[name]["drawn"], ranks[0][name]["drawn"]) for rank in ranks)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_is_one_sentence(name: str, ranks: list[Any]) -> None:
    assert REFUSED[name][2] in ranks[0][name]
    assert ranks[1][name] == ranks[2][name] == ranks[0][name]


@pytest.mark.parametrize(
    ("family", "ranks", "sentence"),
    [
        ("llama", 2, "3 KV heads do not divide among 2 ranks of tensor parallelism: start as many"),
        ("qwen3.5", 3, "every rank would hold all states of linear attention of a 'qwen3_5_text' model"),
        ("gemma4", 3, "every rank would hold all windows of layers that a plan leaves alone of a 'gemma4_text' model"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(family: str, ranks: int, sentence: str) -> None:
    artifact = make_artifact(tiny_model(CONFIGS[family]), 9)
    check_ranks(artifact, 1)
    with pytest.raises(ModelError, match=sentence):
        check_ranks(artifact, ranks)


def test_a_model_whose_attention_alone_is_whole_is_refused(llama: Any) -> None:
    """As it is where experts alone are split."""
    artifact = make_artifact(llama, 9)
    llama.lm_head.weight.full_tensor = lambda: None
    with pytest.raises(ModelError, match=r"its plan has colwise for .*, expected colwise, and nothing but tensor"):
        TensorParallel.of(llama).check(llama, artifact)


def test_a_placement_is_for_its_number_of_ranks(make_artifact: Callable[..., Artifact], llama: Any) -> None:
    artifact = make_artifact(llama, 9)
    assert not placed_on(artifact, 3)
    assert placed_on(on_ranks(artifact, 3), 3)
    assert not placed_on(on_ranks(artifact, 3), 1)
    assert not placed_on(on_ranks(artifact, 3), 2)
    assert not placed_on(on_ranks(artifact, 2), 3)


def test_one_process_keeps_storage_order_and_all_heads(make_artifact: Callable[..., Artifact], llama: Any) -> None:
    artifact, alone = on_ranks(make_artifact(llama, [[9, 5, 7]] * 3), 3), TensorParallel.of(llama)
    assert alone == TensorParallel()
    assert alone.orders(artifact) == [alone.own(order) for order in artifact.budgets.head_order.tolist()]
    weight = torch.arange(6.0).view(3, 2)
    permute(weight, 0, torch.tensor([2, 0, 1]))
    assert weight.tolist() == [[4, 5], [0, 1], [2, 3]]
