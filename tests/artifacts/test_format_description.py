"""FORMAT.md alone is enough: its reader, and what it says of fingerprints and bytes, agree with the code."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import fields

import numpy as np
import pytest
import torch
from format_description import TEXT, program
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompile.artifacts import POLICIES, anchor_bytes, identify, slot_bytes, write
from kvcompile.assemble.tables import key_arrays
from kvcompile.stages import KeyMoments, Moment, Profile, Rotary


@pytest.fixture(scope="module")
def read_kvb():
    return program().read_kvb


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("version", "parts"),
    [
        (1, {}),
        (2, {"choices": (("scored", 9),), "bits": ((4, 8),), "ranks": 2}),
        (3, {"choices": (("scored", 9),), "bits": ((67, 3), (66, 2), (65, 136)), "head_dim": 16, "ranks": 2}),
    ],
)
def test_a_reader_written_from_the_description(make_artifact, read_kvb, tmp_path, dtype, version, parts):
    artifact = make_artifact(dtype=dtype, batch=3, **parts)
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
    assert metadata["format_version"] == version
    if parts:
        for part in ("scorer", "quantiser"):
            expected |= {f"{part}.{name}": values for name, values in vars(getattr(artifact, part)).items()}
        expected["rank"] = artifact.rank
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


def test_every_key_and_tensor_is_described(newer, read_kvb, tmp_path):
    write(newer, tmp_path / "a.kvb")
    metadata, tensors = read_kvb(tmp_path / "a.kvb")
    for key, value in metadata.items():
        names = [f"{key}.{name}" for name in value] if key in ("model", "target", "bytes") else [key]
        assert all(f"`{name}`" in TEXT for name in names)
    assert all(f"`{name}`" in TEXT for name in tensors if not name.startswith("profile."))
    assert all(f"{code} `{name}`" in TEXT for code, name in enumerate(POLICIES))


def test_every_field_of_a_profile_is_described():
    tables = {field.name for field in fields(Profile)} - {"keys", "kept"}
    tables |= {"kept_tokens", "kept_key_loss", "kept_value_loss"}
    rotary = Rotary(np.zeros((1, 2), np.float32), np.arange(2, dtype=np.int32))
    moment = Moment(np.zeros((1, 1, 2), np.float32), np.zeros((1, 1, 3), np.float16))
    tables |= key_arrays(KeyMoments(moment, moment, moment, rotary)).keys()
    assert all(f"`profile.{name}`" in TEXT for name in tables)


def test_metadata_is_compact_and_sorted(artifact, read_kvb, tmp_path):
    write(artifact, tmp_path / "a.kvb")
    metadata, _ = read_kvb(tmp_path / "a.kvb")
    text = json.dumps(json.dumps(metadata, sort_keys=True, separators=(",", ":"))).encode()
    assert text in (tmp_path / "a.kvb").read_bytes()


EXAMPLE = {"head_dim": 64, "windows": (0, 1024), "context": 4096, "batch": 2, "dtype": "bfloat16"}


def says(name, value):
    return re.search(rf"^    {name} .*= {value}$", TEXT, re.MULTILINE)


def test_the_bytes_of_version_1(make_artifact):
    account = make_artifact(**EXAMPLE, choices=(("full", 4096), ("h2o", 600))).bytes
    for name, value in vars(account).items():
        assert says(name, value)


def test_the_bytes_of_version_2(make_artifact):
    own = (None, None)
    account = make_artifact(
        **EXAMPLE, hidden_size=256, choices=(("full", 4096), ("scored", 600)), bits=(own, (8, 4), own, own)
    ).bytes
    assert says("resident", account.resident)
    assert says("scorer", account.scorer)


def test_the_bytes_of_version_3(make_artifact):
    own = (None, None)
    account = make_artifact(**EXAMPLE, choices=(("full", 4096), ("scored", 600)), bits=(own, (66, 3), own, own)).bytes
    assert says("resident", account.resident)


@pytest.mark.parametrize(
    ("head_dim", "k_bits", "v_bits", "state", "slot"),
    [
        (64, 16, 16, 0, 256),  # 2 x 128
        (128, 8, 4, 2, 128 + 4 + 64 + 4 + 2),  # two groups have two scales
        (96, 4, 16, 2, 48 + 4 + 192 + 2),
        (80, 8, 8, 0, 2 * (80 + 4)),
        (256, 4, 4, 2, 2 * (128 + 8) + 2),
        (64, 3, 2, 0, 24 + 2 + 16 + 2),
        (128, 67, 3, 0, 32 + 2 + 16 + 2 + 48 + 4),  # each section has its scales
        (128, 66, 2, 2, 16 + 2 + 16 + 2 + 32 + 4 + 2),
        (256, 65, 67, 0, 16 + 2 + 16 + 2 + 64 + 4 + 32 + 4),
    ],
)
def test_the_bytes_of_a_head(head_dim, k_bits, v_bits, state, slot):
    policy = {0: "recent", 2: "scored"}[state]
    assert slot_bytes(policy, head_dim, k_bits, v_bits) == slot
    quantised = [bits for bits in (k_bits, v_bits) if bits != 16]
    assert anchor_bytes(4, head_dim, k_bits, v_bits, 16) == len(quantised) * head_dim * 2
    assert anchor_bytes(0, head_dim, k_bits, v_bits, 16) == 0


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
