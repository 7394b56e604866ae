"""FORMAT.md alone is enough: its reader, and what it says of fingerprints and bytes, agree with the code."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompile.artifacts
from kvcompile.artifacts import POLICIES, identify, write

TEXT = (Path(kvcompile.artifacts.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read_kvb():
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    imported = [
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names
    ]
    assert sorted(imported) == ["hashlib", "json", "numpy", "struct"]
    assert "from " not in code
    names: dict[str, object] = {}
    exec(code, names)
    return names["read_kvb"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_reader_written_from_the_description(make_artifact, read_kvb, tmp_path, dtype):
    artifact = make_artifact(dtype=dtype, batch=3)
    write(artifact, tmp_path / "a.kvb")
    metadata, tensors = read_kvb(tmp_path / "a.kvb")
    for section in ("model", "target", "bytes"):
        for key, value in metadata[section].items():
            expected = getattr(getattr(artifact, section), key)
            assert value == (list(expected) if isinstance(expected, tuple) else expected)
    for key in ("predicted_loss", "solver", "calibration", "versions"):
        assert metadata[key] == getattr(artifact, key)
    expected = {
        **vars(artifact.budgets),
        "fingerprint.samples": artifact.model.samples,
        **{f"profile.{name}": values for name, values in artifact.profile.items()},
    }
    assert set(tensors) == set(expected)
    for name, values in expected.items():
        assert tensors[name].dtype == values.dtype
        np.testing.assert_array_equal(tensors[name], values)


def test_the_reader_notices_damage(artifact, read_kvb, tmp_path):
    write(artifact, tmp_path / "a.kvb")
    data = bytearray((tmp_path / "a.kvb").read_bytes())
    data[-1] ^= 1
    (tmp_path / "a.kvb").write_bytes(data)
    with pytest.raises(AssertionError):
        read_kvb(tmp_path / "a.kvb")


def test_every_key_and_tensor_is_described(artifact, read_kvb, tmp_path):
    write(artifact, tmp_path / "a.kvb")
    metadata, tensors = read_kvb(tmp_path / "a.kvb")
    for key, value in metadata.items():
        names = [f"{key}.{name}" for name in value] if key in ("model", "target", "bytes") else [key]
        assert all(f"`{name}`" in TEXT for name in names)
    assert all(f"`{name}`" in TEXT for name in tensors if not name.startswith("profile."))
    assert all(f"{code} `{name}`" in TEXT for code, name in enumerate(POLICIES))


def test_metadata_is_compact_and_sorted(artifact, read_kvb, tmp_path):
    write(artifact, tmp_path / "a.kvb")
    metadata, _ = read_kvb(tmp_path / "a.kvb")
    text = json.dumps(json.dumps(metadata, sort_keys=True, separators=(",", ":"))).encode()
    assert text in (tmp_path / "a.kvb").read_bytes()


def test_the_worked_example(make_artifact):
    account = make_artifact(
        head_dim=64,
        windows=(0, 1024),
        context=4096,
        batch=2,
        dtype="bfloat16",
        choices=(("full", 4096), ("h2o", 600)),
    ).bytes
    for name in ("resident", "transient", "full"):
        assert re.search(rf"^    {name} .*= {getattr(account, name)}$", TEXT, re.MULTILINE)


def test_the_fingerprint():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=6,
        intermediate_size=9,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    structure, samples = "", []
    for name, tensor in sorted(model.state_dict().items()):
        structure += f"{name} [{', '.join(str(size) for size in tensor.shape)}]\n"
        elements = tensor.numpy().ravel()
        k = min(elements.size, 16)
        samples += [elements[i * (elements.size - 1) // max(k - 1, 1)] for i in range(k)]
    found = identify(model, "x")
    numbers = np.array(samples, "<f4")
    np.testing.assert_array_equal(found.samples, numbers)
    digests = [hashlib.sha256(part).hexdigest()[:32] for part in (structure.encode(), numbers.tobytes())]
    assert found.fingerprint == "".join(digests)
