"""Which checkpoints an engine may load for an artifact: those of its model, in any element type and however stored."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, make_artifact, tiny_model
from transformers import PreTrainedModel

from kvcompile.artifacts import Artifact, ModelError
from kvcompile.integrations.vllm import samples
from kvcompile.integrations.vllm.checkpoint import check_checkpoint

FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "mixtral", "qwen3-moe")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model(CONFIGS["llama"])


def saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **options: str) -> Path:
    copy.deepcopy(model).to(dtype).save_pretrained(folder, **options)
    return folder


def changed(model: PreTrainedModel, folder: Path, change: Callable[[Weights], object]) -> Path:
    file = saved(model, folder) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    return folder


def check(artifact: Artifact, model: PreTrainedModel, folder: Path, quantised: bool = False) -> str:
    return check_checkpoint(artifact, model.config, folder, quantised)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_models_own_weights_in_any_element_type(model: PreTrainedModel, tmp_path: Path, dtype: torch.dtype) -> None:
    artifact = make_artifact(model, 9)
    compared, total = map(
        int, check(artifact, model, saved(model, tmp_path, dtype)).removesuffix(" tensors").split(" of ")
    )
    tied = bool(model.config.tie_word_embeddings)
    assert total == len(model.state_dict()) - tied
    joined = {"mixtral": 3 * 3, "qwen3_moe": 3 * 2}.get(model.config.model_type, 0)  # experts, Mixtral's router too
    assert compared == total - joined


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_artifact_of_another_element_type(llama: PreTrainedModel, tmp_path: Path, dtype: torch.dtype) -> None:
    artifact = make_artifact(copy.deepcopy(llama).to(dtype), 9)
    assert check(artifact, llama, saved(llama, tmp_path)) == "42 of 42 tensors"


def test_many_files_with_an_index(model: PreTrainedModel, tmp_path: Path) -> None:
    whole, parts = saved(model, tmp_path / "one"), saved(model, tmp_path / "many", max_shard_size="40KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    artifact = make_artifact(model, 9)
    assert check(artifact, model, parts) == check(artifact, model, whole)


def test_tensors_that_the_model_does_not_have_are_passed_over(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path, lambda w: w.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    assert check(make_artifact(llama, 9), llama, folder) == "42 of 42 tensors"


def test_the_weights_of_another_model_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    artifact = make_artifact(model, 9)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight.mul_(1.02)
    with pytest.raises(ModelError, match=r"first of them model\.layers\.1\.self_attn\.o_proj\.weight: load tiny or"):
        check(artifact, model, saved(other, tmp_path, torch.bfloat16))


def test_one_number_that_has_changed_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path, lambda w: w["model.layers.2.mlp.up_proj.weight"][-1, -1].add_(1e-6))
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        check(make_artifact(llama, 9), llama, folder)
    folder = changed(llama, tmp_path, lambda w: w["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        check(make_artifact(llama, 9), llama, folder)


def test_another_shape_or_structure_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    artifact, folder = make_artifact(llama, 9), saved(llama, tmp_path)
    for field, value, word in (("num_key_value_heads", 6, "num_kv_heads 6"), ("vocab_size", 98, "name or shape")):
        config = copy.deepcopy(llama.config)
        setattr(config, field, value)
        with pytest.raises(ModelError, match=word):
            check_checkpoint(artifact, config, folder, False)
    with pytest.raises(ModelError, match="architecture qwen3"):
        check_checkpoint(artifact, CONFIGS["qwen3"], folder, False)


def as_awq(weights: Weights) -> None:
    """Packed projections, and the layers' norms changed by scales that were folded into them."""
    for name in [name for name in weights if "proj.weight" in name]:
        rows, columns = weights.pop(name).shape
        weights[name.replace("weight", "qweight")] = torch.zeros(columns, rows // 8, dtype=torch.int32)
        weights[name.replace("weight", "scales")] = torch.ones(1, rows, dtype=torch.float16)
    for name in weights:
        if "layernorm" in name:
            weights[name] *= 1.7
        if weights[name].dtype == torch.float32:
            weights[name] = weights[name].half()


def test_of_a_quantised_checkpoint_what_is_left_alone(llama: PreTrainedModel, tmp_path: Path) -> None:
    artifact, config = make_artifact(llama, 9), copy.deepcopy(llama.config)
    config.quantization_config = {"quant_method": "awq", "bits": 4, "group_size": 48, "zero_point": True}
    before = copy.deepcopy(config)
    folder = changed(llama, tmp_path, as_awq)
    assert check_checkpoint(artifact, config, folder, True) == "3 of 42 tensors"
    assert vars(config) == vars(before)
    with pytest.raises(ModelError, match="layernorm"):
        check_checkpoint(artifact, config, folder, False)


def test_a_quantised_checkpoint_of_other_weights_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path, lambda w: (as_awq(w), w["lm_head.weight"][0, 0].add_(0.01)))
    with pytest.raises(ModelError, match="first of them lm_head"):
        check(make_artifact(llama, 9), llama, folder, True)


def test_nothing_to_compare_is_refused_with_the_way_out(llama: PreTrainedModel, tmp_path: Path) -> None:
    artifact = make_artifact(llama, 9)
    (tmp_path / "empty").mkdir()
    packed = changed(llama, tmp_path / "packed", lambda w: w.update({name: t.to(torch.int8) for name, t in w.items()}))
    for folder in (packed, tmp_path / "empty"):
        for quantised, what in (
            (True, "no token embedding, last norm or lm_head in"),
            (False, "no token embedding in"),
        ):
            with pytest.raises(ModelError, match=f'{what}.*the option "fingerprint": "ignore" waives that'):
                check(artifact, llama, folder, quantised)
    partly = changed(llama, tmp_path / "partly", lambda w: w.pop("model.embed_tokens.weight"))
    assert check(artifact, llama, partly, True) == "2 of 42 tensors"
    with pytest.raises(ModelError, match="no token embedding"):
        check(artifact, llama, partly)


def test_files_that_cannot_be_read(llama: PreTrainedModel, tmp_path: Path) -> None:
    artifact, folder = make_artifact(llama, 9), saved(llama, tmp_path, max_shard_size="40KB")
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=f"{file.name} cannot be read"):
        check(artifact, llama, folder)
    file.unlink()
    with pytest.raises(ModelError, match=f"{file.name} cannot be read"):
        check(artifact, llama, folder)
    for text in ("{", "[]", json.dumps({"weight_map": []})):
        (folder / samples.INDEX).write_text(text)
        with pytest.raises(ModelError, match=r"index\.json cannot be read"):
            check(artifact, llama, folder)


def test_an_artifact_whose_samples_are_cut_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    artifact = make_artifact(llama, 9)
    short = dataclasses.replace(artifact, model=dataclasses.replace(artifact.model, samples=artifact.model.samples[1:]))
    with pytest.raises(ModelError, match="other samples"):
        check(short, llama, saved(llama, tmp_path))
