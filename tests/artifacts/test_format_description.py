"""FORMAT.md alone is enough: its reader, and what it says of fingerprints and bytes, agree with the code."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import LlamaConfig, LlamaForCausalLM

import kvcompile.artifacts
from kvcompile.artifacts import POLICIES, anchor_bytes, identify, slot_bytes, vector_bytes, write
from kvcompile.assemble.tables import key_arrays
from kvcompile.kernels import decode, encode
from kvcompile.kernels.codecs import codec_of
from kvcompile.stages import KeyMoments, Moment, Profile, Rotary

TEXT = (Path(kvcompile.artifacts.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def described():
    """The functions of the description's own program."""
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    imported = [
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names
    ]
    assert sorted(imported) == ["hashlib", "json", "numpy", "struct"]
    assert "from " not in code
    names: dict[str, object] = {}
    exec(code, names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def read_kvb(described):
    return described.read_kvb


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("parts", [{}, {"choices": (("scored", 9),), "bits": ((4, 8),), "ranks": 2}], ids=["1", "2"])
def test_a_reader_written_from_the_description(make_artifact, read_kvb, tmp_path, dtype, parts):
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
    assert metadata["format_version"] == (2 if parts else 1)
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
    tables = {field.name for field in fields(Profile)} - {"keys"}
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


@pytest.mark.parametrize(
    ("head_dim", "k_bits", "v_bits", "state", "slot"),
    [
        (64, 16, 16, 0, 256),  # 2 x 128
        (128, 8, 4, 2, 128 + 4 + 64 + 4 + 2),  # two groups have two scales
        (96, 4, 16, 2, 48 + 4 + 192 + 2),
        (80, 8, 8, 0, 2 * (80 + 4)),
        (256, 4, 4, 2, 2 * (128 + 8) + 2),
    ],
)
def test_the_bytes_of_a_head(head_dim, k_bits, v_bits, state, slot):
    policy = {0: "recent", 2: "scored"}[state]
    assert slot_bytes(policy, head_dim, k_bits, v_bits) == slot
    quantised = [bits for bits in (k_bits, v_bits) if bits != 16]
    assert anchor_bytes(4, head_dim, k_bits, v_bits, 16) == len(quantised) * head_dim * 2
    assert anchor_bytes(0, head_dim, k_bits, v_bits, 16) == 0


def numbers(name):
    """A row of the description's example of quantisation."""
    return json.loads(re.search(rf"^    {re.escape(name)} +=? *(\[.*?\])", TEXT, re.MULTILINE).group(1))


def test_the_worked_example_of_quantisation(described):
    hadamard = np.array(json.loads(re.search(r"^(\[\[1, 1.*?\]\])", TEXT, re.MULTILINE).group(1)))
    transform, mean, x = (hadamard / 2).astype(np.float16), np.array([1, 0, 0, 0], np.float16), [3, 1, -1, 0.5]
    y = transform @ (np.array(x, np.float32) - mean)
    stored, scales = described.encode(y, 4)
    assert numbers("y") == y.tolist()
    assert scales.tolist() == [0.21875]
    assert "scale  = 1.75 / 8 = 0.21875" in TEXT
    codes = [code for byte in stored.tolist() for code in (byte & 15, byte >> 4)]
    assert numbers("stored") == codes
    assert numbers("c") == [code - 8 for code in codes]
    assert f"the bytes {bytes(stored).hex(' ').upper()}" in TEXT
    assert numbers("y'") == described.decode(stored, scales, 4).tolist()
    back = described.restore(stored, scales, 4, transform, mean)
    np.testing.assert_allclose(transform @ (back - mean), numbers("y'"), atol=1e-6)


vectors = st.sampled_from([2, 64, 66, 80, 96, 128, 192]).flatmap(
    lambda size: hnp.arrays(np.float32, size, elements=st.floats(-1e4, 1e4, width=32))
)


@given(y=vectors, bits=st.sampled_from([4, 8]))
def test_quantisation_as_described(described, y, bits):
    size = codec_of(bits).groups(len(y))
    hypothesis.assume(len(y) % (2 * size) == 0)
    stored, scales = described.encode(y, bits)
    assert (stored.dtype, scales.dtype, len(scales)) == (np.uint8, np.float16, size)
    assert stored.nbytes + scales.nbytes == vector_bytes(len(y), bits)
    # Half a step of its group at most, but for the outermost level where rounding has made the scale too small.
    step = np.repeat(scales.astype(np.float32), len(y) // size)
    error = abs(described.decode(stored, scales, bits) - y)
    assert (error <= step * (0.5 + 2 ** (bits - 1) * 2**-11 + 1e-3)).all()


@given(y=vectors, bits=st.sampled_from([4, 8]))
def test_the_runtime_quantises_as_described(described, y, bits):
    hypothesis.assume(codec_of(bits).fits(len(y)))
    stored, scales = described.encode(y, bits)
    found_stored, found_scales = encode(torch.from_numpy(y), bits)
    np.testing.assert_array_equal(found_stored.numpy(), stored)
    np.testing.assert_array_equal(found_scales.numpy(), scales)
    found = decode(found_stored, found_scales, bits, torch.float32)
    np.testing.assert_array_equal(found.numpy(), described.decode(stored, scales, bits))


def test_turning_queries_and_outputs_as_described(described, newer):
    """Attention over what is stored, its queries and output turned, is attention over what was restored."""
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(2, 9, 8))
    query = rng.normal(size=8)
    q = newer.quantiser
    tables = (q.key_transform, q.key_mean, q.value_transform, q.value_mean)
    key_transform, key_mean, value_transform, value_mean = (table[0, 1].astype(np.float64) for table in tables)

    def stored(vectors, transform, mean, bits):
        packed = [described.encode(transform @ (x - mean), bits) for x in vectors]
        turned = np.stack([described.decode(*one, bits) for one in packed])
        return turned, np.stack([described.restore(*one, bits, transform, mean) for one in packed])

    def weights(logits):
        exponentials = np.exp(logits - logits.max())
        return exponentials / exponentials.sum()

    turned_keys, restored_keys = stored(keys, key_transform, key_mean, 8)
    turned_values, restored_values = stored(values, value_transform, value_mean, 4)
    expected = weights(restored_keys @ query) @ restored_values
    turned_query = np.linalg.inv(key_transform).T @ query
    found = np.linalg.inv(value_transform) @ (weights(turned_keys @ turned_query) @ turned_values) + value_mean
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


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
