"""Every wrong field is refused in one sentence that names it; the files here are well-formed safetensors."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load, save

from kvcompile.artifacts import FORMAT_VERSION, from_bytes, to_bytes

MISSING = object()


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
        ("format_version", 0, "expected an integer from 1 to 4"),
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


def test_a_context_beyond_the_models_chunk(artifact, with_metadata):
    context, message = artifact.target.context, with_metadata("model.architecture", "llama4_text")
    assert f": target.context is {context}, expected an integer from 1 to 16" in message


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
