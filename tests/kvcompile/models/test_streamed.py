"""Models whose parts read their weights when they are used are the models that are held whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import saved, streamed, whole
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

from kvcompile.artifacts import identify
from kvcompile.artifacts.errors import ModelError
from kvcompile.models import arithmetic, fast_arithmetic, sampler, ties
from kvcompile.models.checkpoint import INDEX
from kvcompile.models.resident import in_turn, is_streamed, resident


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_fingerprint_of_every_family(name: str, tied: bool, tmp_path: Path, reads: Counter[str]) -> None:
    config = CONFIGS[name].__class__(**{**CONFIGS[name].to_dict(), "tie_word_embeddings": tied})
    folder = saved(tiny_model(config), tmp_path)
    there, model = whole(folder), streamed(folder)
    assert identify(model, "tiny", sampler(model)).fingerprint == identify(there, "tiny").fingerprint
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, there(ids).logits)
    parts = [model.get_input_embeddings(), *model.model.layers, model.get_output_embeddings()]
    assert all(is_streamed(part) and all(p.is_meta for p in part.parameters()) for part in parts)
    assert not is_streamed(there.get_input_embeddings())


def test_a_part_in_use_is_read_once(tmp_path: Path, reads: Counter[str]) -> None:
    model = streamed(saved(tiny_model(CONFIGS["llama"]), tmp_path))
    key, ids = "model.layers.1.mlp.up_proj.weight", torch.arange(3, 20)[None]
    model(ids)
    assert reads[key] == 1
    with resident(model.model.layers[1]):
        weight = model.model.layers[1].mlp.up_proj.weight
        assert not weight.is_meta
        assert not weight.requires_grad
        model(ids)
        model(ids)
    assert (reads[key], reads["model.layers.0.mlp.up_proj.weight"]) == (2, 3)
    there = [not layer.mlp.up_proj.weight.is_meta for layer in in_turn(model.model.layers)]
    assert there == [True] * 3


def test_a_part_that_fails_is_given_up(tmp_path: Path) -> None:
    model = streamed(saved(tiny_model(CONFIGS["qwen2"]), tmp_path))
    with pytest.raises(Exception):  # noqa: B017, PT011
        model.model.layers[0](torch.zeros(1, 2, 3))
    assert all(p.is_meta for p in model.model.layers.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_sixteen_bit_weights_are_widened_where_those_of_a_whole_model_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        arithmetic, "fast_dtype", lambda dtype, _=None: torch.float32 if dtype == torch.bfloat16 else dtype
    )
    folder = saved(tiny_model(CONFIGS[name], torch.bfloat16), tmp_path)
    there, model, ids = whole(folder), streamed(folder), torch.arange(3, 40)[None]
    assert model.dtype == there.dtype == torch.bfloat16
    assert identify(model, "tiny", sampler(model)).fingerprint == identify(there, "tiny").fingerprint
    with torch.no_grad(), fast_arithmetic(there), fast_arithmetic(model):
        assert model.dtype == torch.float32
        logits = model(ids).logits
        assert logits.dtype == torch.float32
        assert torch.equal(logits, there(ids).logits)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_tensor_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(CONFIGS[name]), tmp_path)
    index = json.loads((folder / INDEX).read_text())
    (gone, *_) = [key for key in index["weight_map"] if "layers.1" in key and "o_proj" in key]
    del index["weight_map"][gone]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"lacks 1 tensors, the first of them {gone}"):
        streamed(folder)(torch.arange(5)[None])


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = saved(tiny_model(CONFIGS["llama"]), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(ModelError, match=r"mlp\..*_proj\.weight of shape .*expected .* by its configuration"):
        streamed(folder)


def test_weights_compute_the_same_wherever_they_lie(tmp_path: Path) -> None:
    """Those that are mapped from a file lie at odd places, which the last bits of products may depend on."""
    folder = saved(tiny_model(CONFIGS["llama"]), tmp_path)
    weights = {name: tensor.clone() for name, tensor in whole(folder).state_dict().items()}
    model = whole(folder)
    for parameter in model.parameters():
        apart = torch.empty(parameter.numel() + 1)[1:].view_as(parameter)
        parameter.data = apart.copy_(parameter.data)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with fast_arithmetic(model):
        assert all(tensor.data_ptr() % 64 == 0 for tensor in model.state_dict().values())
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


def changed(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """The folder of a model in one file, with other tensors and another configuration."""
    file, config = folder / "model.safetensors", folder / "config.json"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder


@pytest.mark.parametrize("at_once", [100, 1 << 24])
@pytest.mark.parametrize("where", [None, 0, -1])
def test_embeddings_that_are_tied_by_the_configuration_alone_are_parted(
    where: int | None, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ties, "AT_ONCE", at_once)
    folder = saved(tiny_model(CONFIGS["llama"]), tmp_path, "1GB")
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    if where is not None:
        head[where] += 1
    changed(folder, {"lm_head.weight": head}, tie_word_embeddings=True)
    there, model, ids = whole(folder), streamed(folder), torch.arange(3, 40)[None]
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (where is None)
    assert identify(model, "tiny", sampler(model)).fingerprint == identify(there, "tiny").fingerprint
    with torch.no_grad():
        assert torch.equal(model(ids).logits, there(ids).logits)


def test_without_a_dtype_in_the_configuration_it_is_that_of_a_whole_model(tmp_path: Path) -> None:
    folder = saved(tiny_model(CONFIGS["llama"]), tmp_path, "1GB")
    tensors = load_file(folder / "model.safetensors")
    changed(folder, {key: value.bfloat16() for key, value in tensors.items() if "norm" not in key}, dtype=None)
    assert streamed(folder).dtype == whole(folder).dtype == torch.bfloat16


def test_widened_weights_are_not_kept_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without instructions for bfloat16; afterwards they are what they were."""
    monkeypatch.setattr(arithmetic, "fast_dtype", lambda dtype, device: torch.float32)
    layer = torch.nn.Linear(8, 4).to(torch.bfloat16)
    before, held = layer.weight.detach().clone(), StorageWeakRef(layer.weight.untyped_storage())
    with fast_arithmetic(layer):
        assert layer.weight.dtype == torch.float32
        assert held.expired()
    assert torch.equal(layer.weight, before)
