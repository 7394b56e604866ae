"""Every wrong tensor is refused in one sentence that names it."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from kvcompile.kernels.codecs import CODECS

MISSING = object()
QUANTISED = ", ".join(str(id) for id, codec in sorted(CODECS.items()) if codec.format_version)
"""The ids of codecs, as refusals list them."""


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


@pytest.mark.parametrize("make", [lambda v: v.astype(np.float64), lambda v: v.astype(np.int64)])
def test_profile_of_another_element_type(with_tensor, make):
    message = with_tensor("profile.half", make)
    assert ": tensor profile.half has the element type" in message
    assert "expected F32 or F16 or I32 or U8" in message


@pytest.mark.parametrize("shape", [(0,), (), (1, 2), (2,)])
def test_profile_of_another_window(data, unpack, pack, refusal, shape):
    tensors, metadata = unpack(data)
    message = refusal(pack(tensors | {"profile.window": np.ones(shape, np.int32)}, metadata))
    assert f": tensor profile.window has the shape {list(shape)}, expected [1]" in message


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
