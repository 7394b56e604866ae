"""Local folders: what loads, and what is refused in a sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, GptOssConfig, GptOssForCausalLM

from kvcompile.artifacts.errors import ModelError
from kvcompile.models import load


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_loads_as_it_is(tiny_model: Path) -> None:
    loaded = load(str(tiny_model), device="cpu")
    assert loaded.name == str(tiny_model)
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.tokenizer("hello world").input_ids == [3, 4]


def test_dtype_can_be_asked_for(tiny_model: Path) -> None:
    assert load(str(tiny_model), dtype=torch.float32, device="cpu").model.dtype == torch.float32


def test_a_relative_folder_gets_a_name_that_holds_elsewhere(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model.parent)
    name = load(tiny_model.name, device="cpu").name
    monkeypatch.chdir(os.sep)
    assert load(name, device="cpu").name == str(tiny_model)


@pytest.mark.parametrize(
    "name", ["", "zzz", "missing.gguf", "some/missing.gguf", "./missing", "/missing/folder", "a/b/c"]
)
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"there is no model .*: expected a folder, a \.gguf file, an alias"):
        load(name)


def test_a_misspelt_alias_gets_a_suggestion() -> None:
    with pytest.raises(ModelError, match=r"'qwen3-8' \(did you mean qwen3-8b\?\)"):
        load("qwen3-8")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded .*expected a folder with config\.json"):
        load(str(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused(broken: Path, file: str) -> None:
    whole = (broken / file).read_bytes()
    (broken / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="broken cannot be loaded"):
        load(str(broken))


def test_missing_weights_are_not_made_up(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors, .* model\.layers\.1\.self_attn\.k_proj\.weight"):
        load(str(broken))


@pytest.mark.parametrize("model_type", ["t5", "clip", "gemma3n", "vit"])
def test_other_kinds_of_models_are_refused(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelError, match=f"is a {model_type} model: expected a text-only decoder"):
        load(str(tmp_path))


def test_packed_weights_are_refused(broken: Path) -> None:
    edit_config(broken, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(ModelError, match="has packed, quantised weights"):
        load(str(broken))


GPT_OSS = {
    "vocab_size": 5, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "max_position_embeddings": 128,
}  # fmt: skip


def test_experts_in_mxfp4_are_unpacked(tiny_model: Path, tmp_path: Path) -> None:
    """As GPT-OSS is published: two numbers of 4 bits a byte, the first in the low half, and an exponent for 32."""
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    GptOssForCausalLM(GptOssConfig(**GPT_OSS)).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    draw, name = torch.Generator().manual_seed(0), "model.layers.0.mlp.experts.gate_up_proj"
    for key in [key for key in tensors if key.endswith("_proj") and ".experts." in key]:
        experts, inputs, outputs = tensors.pop(key).shape
        rows = (experts, outputs, inputs // 32)
        tensors[f"{key}_blocks"] = torch.randint(256, (*rows, 16), generator=draw, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(120, 124, rows, generator=draw, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    model = load(str(tmp_path), device="cpu").model
    assert model.config._attn_implementation == "eager"
    numbers = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = torch.cat([numbers, -numbers])
    codes, scales = (tensors[f"{name}_{part}"] for part in ("blocks", "scales"))
    pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    wanted = (numbers[pairs] * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).mT
    torch.testing.assert_close(model.model.layers[0].mlp.experts.gate_up_proj.float(), wanted)


def test_experts_in_mxfp4_are_not_streamed(broken: Path) -> None:
    edit_config(broken, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(ModelError, match=r"MXFP4, which cannot be unpacked part by part: expected --profile-memory in"):
        load(str(broken), device="cpu", memory=1)


QWEN = {
    "vocab_size": 5, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None, "max_position_embeddings": 128,
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip


QWEN_SIGHT = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
LLAMA = {
    "vocab_size": 5, "hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None, "num_local_experts": 2,
}  # fmt: skip
LLAMA_SIGHT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 28,
    "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
}  # fmt: skip
GEMMA = {
    "vocab_size": 5, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
LARGE_GEMMA = GEMMA | {
    "num_key_value_heads": 4, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 2,
    "attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "pad_token_id": 0,
}  # fmt: skip
GEMMA_SIGHT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14, "position_embedding_size": 64,
}  # fmt: skip
UNIFIED_SIGHT = {
    "patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64,
}  # fmt: skip


@pytest.mark.parametrize("memory", [None, 1], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("family", "text", "sight"),
    [
        ("qwen3_5", QWEN, QWEN_SIGHT),
        ("llama4", LLAMA, LLAMA_SIGHT),
        ("gemma3", GEMMA, GEMMA_SIGHT),
        ("gemma4", LARGE_GEMMA, GEMMA_SIGHT),
        ("gemma4_unified", LARGE_GEMMA, UNIFIED_SIGHT),
    ],
    ids=["qwen", "llama", "gemma", "large-gemma", "unified-gemma"],
)
def test_of_a_checkpoint_that_sees_too_the_decoder_of_text_is_loaded(
    tiny_model: Path, tmp_path: Path, family: str, text: dict, sight: dict, memory: int | None
) -> None:
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    config = AutoConfig.for_model(family, text_config=text, vision_config=sight)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    model = load(str(tmp_path), device="cpu", memory=memory).model
    assert model.config.get_text_config().model_type == f"{family}_text"
    ids = torch.tensor([[3, 4, 3, 1]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits)
    assert not any("vis" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("memory", [None, 1], ids=["whole", "streamed"])
def test_names_that_tensors_had_before(tiny_model: Path, tmp_path: Path, memory: int | None) -> None:
    """Gemma-3's checkpoints have the decoder's under `language_model.model`."""
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    config = AutoConfig.for_model("gemma3", text_config=GEMMA, vision_config=GEMMA_SIGHT)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    now = load(str(tmp_path), device="cpu").model
    tensors = load_file(tmp_path / "model.safetensors")
    assert any("language_model" in name for name in tensors)
    before = {
        re.sub(r"^(model\.)?language_model\.(model\.)?", "language_model.model.", name): tensor
        for name, tensor in tensors.items()
    }
    save_file(before, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor([[3, 4, 3, 1]])
    with torch.no_grad():
        torch.testing.assert_close(load(str(tmp_path), device="cpu", memory=memory).model(ids).logits, now(ids).logits)


def test_code_of_a_checkpoint_is_not_run(broken: Path) -> None:
    (broken / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(broken, model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(broken))


def test_an_unknown_device_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="cannot be moved to abacus"):
        load(str(tiny_model), device="abacus")
