"""Every wrong field is refused in one sentence that names it; the files here are well-formed safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load, save

import kvcompile.artifacts.checks as checks
from kvcompile.artifacts import FORMAT_VERSION, ArtifactError, from_bytes, read, to_bytes, write
from kvcompile.kernels.codecs import CODECS

MISSING = object()
QUANTISED = ", ".join(map(str, sorted(CODECS)))
"""The ids of codecs, as refusals list them."""


@pytest.fixture(scope="module")
def data(artifact) -> bytes:
    return to_bytes(artifact)


@pytest.fixture
def with_metadata(data, unpack, pack, refusal):
    """The refusal after one metadata field was given another value, or none."""

    def change(field, value):
        tensors, metadata = unpack(data)
        *path, last = field.split(".")
        section = metadata
        for key in path:
            section = section[key]
        if value is MISSING:
            del section[last]
        else:
            section[last] = value
        return refusal(pack(tensors, metadata))

    return change


@pytest.fixture
def with_tensor(data, unpack, pack, refusal):
    """The refusal after one tensor was changed in place, replaced, or taken away."""

    def change(name, make):
        tensors, metadata = unpack(data)
        changed = make(tensors.pop(name).copy())
        if changed is not MISSING:
            tensors[name] = changed
        return refusal(pack(tensors, metadata))

    return change


def at(index, value):
    def change(values):
        values[index] = value
        return values

    return change


FIELDS = [
    "format_version",
    "checksum",
    "model",
    "target",
    "bytes",
    "predicted_loss",
    "solver",
    "calibration",
    "versions",
    *[
        f"model.{key}"
        for key in (
            "name",
            "architecture",
            "num_layers",
            "num_attention_heads",
            "num_kv_heads",
            "head_dim",
            "hidden_size",
            "windows",
            "dtype",
            "fingerprint",
        )
    ],
    *[f"target.{key}" for key in ("bytes", "context", "batch", "dtype")],
    *[f"bytes.{key}" for key in ("resident", "scorer", "transient", "full")],
]


@pytest.mark.parametrize("field", FIELDS)
def test_missing_metadata(with_metadata, field):
    assert f": {field} is missing" in with_metadata(field, MISSING)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [True, -1, 1.5, 10**30, "x\ny\x1b[31m", [1], [[]], {"a": [{}]}, ""])
def test_metadata_of_another_type_or_range(with_metadata, field, value):
    if (field in ("solver", "calibration") and isinstance(value, dict)) or (
        field == "predicted_loss" and isinstance(value, float | int) and value in (-1, 1.5)
    ):
        assert ": checksum is" in with_metadata(field, value)
    else:
        assert f": {field}" in with_metadata(field, value)


@pytest.mark.parametrize("field", [f for f in FIELDS if f != "predicted_loss"])
def test_metadata_null(with_metadata, field):
    assert f": {field} is None, expected" in with_metadata(field, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["predicted_loss", "solver.x", "target.bytes"])
def test_numbers_that_json_has_not(with_metadata, field, value):
    assert "is not a finite number" in with_metadata(field, value)


def test_numbers_beyond_f64(data, unpack, pack, refusal):
    tensors, metadata = unpack(data)
    metadata["solver"] = {"x": 12.75}
    message = refusal(pack(tensors, json.dumps(metadata).replace("12.75", "1e999")))
    assert "1e999 is not a finite number" in message


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("format_version", FORMAT_VERSION + 1, f"reads up to version {FORMAT_VERSION}, upgrade"),
        ("format_version", 10**50, f"reads up to version {FORMAT_VERSION}, upgrade"),
        ("format_version", 0, "expected an integer from 1 to 3"),
        ("format_version", "1", "expected an integer"),
        ("model.num_layers", 0, "from 1 to 1024"),
        ("model.num_layers", 2**40, "from 1 to 1024"),
        ("model.num_kv_heads", 3, "a divisor of num_attention_heads 4"),
        ("model.windows", [0, 0], "expected 3 integers"),
        ("model.windows", [0, 0, -1], "model.windows[2] is -1"),
        ("model.windows", [0, True, 16], "model.windows[1] is True"),
        ("model.fingerprint", "AB" * 32, "lower-case hex"),
        ("model.dtype", "int8", "expected one of bfloat16, float16, float32"),
        ("target.dtype", "bfloat17", "expected one of bfloat16, float16, float32"),
        ("target.batch", 2**40, "from 1 to 1048576"),
        ("target.context", 2**31, "from 1 to 2147483647"),
    ],
)
def test_metadata_ranges(with_metadata, field, value, words):
    message = with_metadata(field, value)
    assert f": {field}" in message
    assert words in message


TENSORS = ["policy", "capacity", "sink", "recent", "k_bits", "v_bits", "head_order", "fingerprint.samples"]


@pytest.mark.parametrize("name", TENSORS)
def test_missing_tensor(with_tensor, name):
    assert f": tensor {name} is missing" in with_tensor(name, lambda values: MISSING)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.int8, np.bool_])
def test_tensor_of_another_element_type(with_tensor, name, dtype):
    assert f": tensor {name} has the element type" in with_tensor(name, lambda values: values.astype(dtype))


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize(
    "make",
    [lambda v: v[..., :0], lambda v: np.stack([v, v]), lambda v: np.array(v.flat[0]), lambda v: v.reshape(1, -1)],
)
def test_tensor_of_another_shape(with_tensor, name, make):
    assert f": tensor {name} has the shape" in with_tensor(name, make)


# The default artifact's head [0, 0] is full at 64 tokens, [0, 1] recent at 20, [1, 0] h2o at 24 and [1, 1] snapkv at 1;
# layer 2 slides over 16 tokens.
@pytest.mark.parametrize(
    ("name", "index", "value", "words"),
    [
        (
            "policy",
            (0, 0),
            5,
            "policy[0, 0] is 5, expected one of 0 (full), 1 (recent), 2 (h2o), 3 (snapkv), 4 (scored)",
        ),
        ("policy", (1, 1), 255, "policy[1, 1] is 255"),
        ("policy", (2, 1), 2, "policy[2, 1] is h2o, expected recent in a sliding-window layer"),
        ("policy", (0, 1), 0, "capacity[0, 1] is 20, expected all 64 tokens"),
        ("policy", (1, 0), 1, "recent[1, 0] is 10, expected capacity - sink = 20 with policy recent"),
        ("k_bits", (0, 0), 32, f"k_bits[0, 0] is 32, expected one of {QUANTISED}, 16 for a float16 cache"),
        ("v_bits", (2, 1), 5, f"v_bits[2, 1] is 5, expected one of {QUANTISED}, 16"),
        ("v_bits", (2, 1), 0, f"v_bits[2, 1] is 0, expected one of {QUANTISED}, 16"),
        ("capacity", (1, 0), -24, "capacity[1, 0] is -24, expected 1 to 64 tokens"),
        ("capacity", (1, 0), -(2**31), "capacity[1, 0] is -2147483648"),
        ("capacity", (1, 0), 2**31 - 1, "capacity[1, 0] is 2147483647, expected 1 to 64"),
        ("capacity", (1, 0), 65, "capacity[1, 0] is 65, expected 1 to 64"),
        ("capacity", (1, 0), 0, "capacity[1, 0] is 0"),
        ("capacity", (2, 0), 17, "capacity[2, 0] is 17, expected 1 to 16"),
        ("capacity", (2, 0), 64, "capacity[2, 0] is 64, expected 1 to 16"),
        ("sink", (1, 0), -1, "sink[1, 0] is -1"),
        ("sink", (1, 0), 2**31 - 1, "sink[1, 0] + recent[1, 0] is 2147483647 + 10, expected at most the capacity 24"),
        ("recent", (1, 0), 0, "recent[1, 0] is 0"),
        ("recent", (1, 0), 21, "is 4 + 21, expected at most the capacity 24"),
        ("recent", (0, 1), 15, "recent[0, 1] is 15, expected capacity - sink = 16"),
        ("recent", (2, 1), 15, "recent[2, 1] is 15, expected capacity - sink = 16"),
        ("head_order", (0, 0), 1, "head_order[0] is [1, 1], expected a permutation of 0 to 1"),
        ("head_order", (2, 0), -1, "head_order[2] is [-1, 1]"),
        ("head_order", (1, 1), 2, "head_order[1] is [1, 2]"),
        ("fingerprint.samples", 3, np.nan, "tensor fingerprint.samples has nan at [3]"),
        ("profile.recent_loss", (2, 1, 0), np.nan, "tensor profile.recent_loss has nan at [2, 1, 0]"),
        ("profile.recent_loss", (2, 1, 0), -np.inf, "tensor profile.recent_loss has -inf at [2, 1, 0]"),
        ("profile.half", (), np.inf, "tensor profile.half has inf at []"),
    ],
)
def test_values(with_tensor, name, index, value, words):
    assert words in with_tensor(name, at(index, value))


@pytest.mark.parametrize("changed", [{"sink": 1, "recent": 15}, {"capacity": 8, "recent": 8}])
def test_sliding_layers_hold_their_window(data, unpack, pack, refusal, changed):
    tensors, metadata = unpack(data)
    for name, value in changed.items():
        tensors[name] = at((2, 0), value)(tensors[name].copy())
    assert f": {next(iter(changed))}[2, 0] is" in refusal(pack(tensors, metadata))


@pytest.mark.parametrize("name", ["resident", "scorer", "transient", "full"])
@pytest.mark.parametrize("by", [1, 2**40])
def test_byte_account(data, unpack, with_metadata, name, by):
    value = unpack(data)[1]["bytes"][name]
    assert f": bytes.{name} is {value + by}, expected {value} " in with_metadata(f"bytes.{name}", value + by)


def test_more_bytes_than_the_target(artifact, with_metadata):
    resident = artifact.bytes.resident
    message = with_metadata("target.bytes", resident - 1)
    assert f": bytes.resident is {resident}, expected at most target.bytes {resident - 1}" in message


def test_byte_account_counts_the_batch(make_artifact, unpack, pack, refusal):
    tensors, metadata = unpack(to_bytes(make_artifact(batch=2)))
    metadata["bytes"]["resident"] //= 2
    assert ": bytes.resident is" in refusal(pack(tensors, metadata))


@pytest.mark.parametrize("make", [lambda v: v.astype(np.float64), lambda v: v.astype(np.int64)])
def test_profile_of_another_element_type(with_tensor, make):
    message = with_tensor("profile.half", make)
    assert ": tensor profile.half has the element type" in message
    assert "expected F32 or F16 or I32 or U8" in message


def test_profile_without_a_printable_name(data, unpack, pack, refusal):
    tensors, metadata = unpack(data)
    for name in ("profile.", "profile.a\nb\x1b[31m"):
        assert "name of a profile tensor" in refusal(pack(tensors | {name: np.zeros(1, np.float32)}, metadata))


def test_profile_of_an_impossible_shape(refusal, data):
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for shape in ([0] * 65, [0, 2**63]):
        header["profile.codes"]["shape"] = shape
        text = json.dumps(header).encode()
        message = refusal(struct.pack("<Q", len(text)) + text + data[8 + length :])
        assert ": tensor profile.codes has the shape" in message


def test_unknown_keys_and_tensors_are_ignored(artifact, assert_same, data):
    # A later writer of this version: its own checksum, more keys on every level, another tensor, another metadata key.
    length = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + length])
    metadata = json.loads(entries["__metadata__"]["kvcompile"])
    for section in (metadata, metadata["model"], metadata["target"], metadata["bytes"]):
        section["zzz"] = {"new": [1]}
    tensors = dict(load(data)) | {"zzz": np.zeros(3, np.float64)}

    def pack(checksum):
        return save(tensors, {"kvcompile": json.dumps(metadata | {"checksum": checksum})})

    later = pack(hashlib.sha256(pack("0" * 64)).hexdigest())
    assert_same(from_bytes(later, "x"), artifact)


@pytest.mark.parametrize("checksum", ["0" * 64, "g" * 64, "é" * 64, "\x7f" * 64, "A" * 64, "", "a", None, 5])
def test_wrong_checksum(with_metadata, checksum):
    assert ": checksum is" in with_metadata("checksum", checksum)


def test_checksum_that_stands_twice(with_metadata):
    assert ": checksum stands 2 times in the header" in with_metadata("checksum", "ab" * 32)  # the fingerprint


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "nan", '"x"', "[" * 100_000, "9" * 5000])
def test_metadata_that_is_no_object(data, unpack, pack, refusal, text):
    assert ": the metadata key kvcompile is" in refusal(pack(unpack(data)[0], text))


def test_deep_metadata(data, unpack, pack, refusal):
    tensors, metadata = unpack(data)
    for depth in (100, 900, 980, 990, 5000):
        text = json.dumps(metadata | {"solver": "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
        refusal(pack(tensors, text))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_other_safetensors_files(refusal, metadata):
    assert ": the metadata key kvcompile is missing" in refusal(save({"x": np.zeros(3, np.float32)}, metadata))


@pytest.mark.parametrize("data_", [b"", b"\0", b"\x89PNG\r\n\x1a\n" + bytes(64), b"\xff" * 64, b"{}", b"\n" * 100])
def test_other_files(refusal, data_):
    assert ": the file is cut short or not safetensors" in refusal(data_)


def test_no_such_file(tmp_path):
    with pytest.raises(ArtifactError, match="the file cannot be read: No such file or directory"):
        read(tmp_path / "no.kvb")


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ArtifactError, match="is not a regular file"):
            read(path)


@pytest.mark.parametrize("name", ["a\0b", "n" * 300, "two\nlines", "\ud800"])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(ArtifactError) as caught:
        read(tmp_path / name)
    assert str(caught.value).isprintable()


def test_size_limit(artifact, tmp_path, monkeypatch):
    write(artifact, tmp_path / "a.kvb")
    monkeypatch.setattr(checks, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ArtifactError, match="expected at most 1000"):
        read(tmp_path / "a.kvb")


def test_a_huge_sparse_file_is_not_read_whole(tmp_path):
    with open(tmp_path / "a.kvb", "wb") as file:
        file.truncate(2**34)
    with pytest.raises(ArtifactError, match="has 17179869184 bytes"):
        read(tmp_path / "a.kvb")
