"""What version 2 added is refused by name too: scorer, quantiser and ranks, beside the heads that need them."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from kvcompile.artifacts import ArtifactError, to_bytes, validate
from kvcompile.kernels.codecs import CODECS

SCORER = ["scorer.weight", "scorer.bias"]
QUANTISER = [f"quantiser.{name}" for name in ("key_transform", "key_mean", "value_transform", "value_mean")]
QUANTISED = ", ".join(str(id) for id, codec in sorted(CODECS.items()) if codec.format_version)
"""The ids of codecs, as refusals list them."""


@pytest.fixture(scope="module")
def data(newer) -> bytes:
    return to_bytes(newer)


@pytest.fixture
def changed(data, unpack, pack, refusal):
    """The refusal after tensors were changed by functions, or taken away (None), and the version maybe, too."""

    def change(changes, version=2):
        tensors, metadata = unpack(data)
        for name, make in changes.items():
            values = tensors.pop(name)
            if make is not None:
                tensors[name] = make(values.copy())
        return refusal(pack(tensors, metadata | {"format_version": version}))

    return change


def at(index, value):
    def change(values):
        values[index] = value
        return values

    return change


def test_scored_heads_without_a_scorer(changed):
    message = changed(dict.fromkeys(SCORER))
    assert ": tensor scorer.weight is missing, expected a version 2 file with it for scored heads" in message


def test_quantised_heads_without_a_quantiser(changed):
    message = changed(dict.fromkeys(QUANTISER))
    assert ": tensor quantiser.key_transform is missing, expected a version 2 file" in message


def test_the_parts_of_a_version_1_file_mean_nothing(changed):
    assert ": tensor scorer.weight is missing, expected a version 2 file" in changed({}, version=1)
    assert ": tensor quantiser.key_transform is missing, expected a version 2 file" in changed(
        {"policy": lambda values: np.where(values == 4, 3, values).astype(np.uint8)}, version=1
    )


@pytest.mark.parametrize("name", SCORER + QUANTISER)
def test_half_a_part(changed, name):
    assert f": tensor {name} is missing, expected element type" in changed({name: None})


@pytest.mark.parametrize("name", [*SCORER, *QUANTISER, "rank"])
@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.uint8])
def test_another_element_type(changed, name, dtype):
    assert f": tensor {name} has the element type" in changed({name: lambda values: values.astype(dtype)})


def test_float_types_are_not_exchanged(changed):
    assert "has the element type 'F32', expected F16" in changed({"scorer.weight": lambda v: v.astype(np.float32)})
    assert "has the element type 'F16', expected F32" in changed({"scorer.bias": lambda v: v.astype(np.float16)})


@pytest.mark.parametrize("name", [*SCORER, *QUANTISER, "rank"])
@pytest.mark.parametrize(
    "make",
    [lambda v: v[..., :0], lambda v: v[:1], lambda v: np.stack([v, v]), lambda v: v[0], lambda v: v.reshape(1, -1)],
)
def test_another_shape(changed, name, make):
    assert f": tensor {name} has the shape" in changed({name: make})


@pytest.mark.parametrize("name", SCORER + QUANTISER)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(changed, name, value):
    message = changed({name: lambda values: at((1, 0, *[2] * (values.ndim - 2)), value)(values)})
    assert f": tensor {name} has {value} at [1, 0" in message


@pytest.mark.parametrize("name", ["quantiser.key_transform", "quantiser.value_transform"])
@pytest.mark.parametrize(
    ("matrix", "found"),
    [
        (np.zeros((8, 8)), "has singular values from 0 to 0 at [1, 0]"),
        (np.ones((8, 8)), "to 8 at [1, 0]"),
        (np.diag([1, 1, 1, 1, 1, 1, 1, 0]), "has singular values from 0 to 1 at [1, 0]"),
        (np.diag([6e4, 1, 1, 1, 1, 1, 1, 1]), "has singular values from 1 to 6e+04 at [1, 0]"),
    ],
)
def test_transforms_without_a_usable_inverse(changed, name, matrix, found):
    message = changed({name: at((1, 0), matrix)})
    assert f": tensor {name} has singular values from" in message
    assert found in message
    assert "expected an invertible matrix" in message


@pytest.mark.parametrize("value", [-1, 2, 2**31 - 1, -(2**31)])
def test_ranks_that_are_none(changed, value):
    assert f": rank[1, 1] is {value}, expected 0 to 1" in changed({"rank": at((1, 1), value)})


@pytest.mark.parametrize("bits", [0, 1, 5, 15, 32, 64, 68, 255])
@pytest.mark.parametrize("name", ["k_bits", "v_bits"])
def test_other_widths(changed, name, bits):
    message = changed({name: at((0, 1), bits)})
    assert f": {name}[0, 1] is {bits}, expected one of {QUANTISED}, 16 for a float16 cache" in message


def test_half_precision_in_a_float32_cache(make_artifact, pack, unpack, refusal):
    tensors, metadata = unpack(to_bytes(make_artifact(dtype="float32", bits=((4, 8),))))
    tensors["k_bits"] = at((0, 0), 16)(tensors["k_bits"].copy())
    assert f": k_bits[0, 0] is 16, expected one of {QUANTISED}, 32 for a float32 cache" in refusal(
        pack(tensors, metadata)
    )


def test_scored_heads_in_a_sliding_layer(changed):
    message = changed({"policy": at((1, 0), 4)})
    assert ": policy[1, 0] is scored, expected recent in a sliding-window layer" in message


@pytest.mark.parametrize("by", [-1, 1, 2**40])
def test_bytes_of_scorer_and_quantiser(newer, data, unpack, pack, refusal, by):
    tensors, metadata = unpack(data)
    metadata["bytes"]["scorer"] += by
    expected = newer.bytes.scorer
    assert f": bytes.scorer is {expected + by}, expected {expected} " in refusal(pack(tensors, metadata))


def test_bytes_of_scales_scores_and_anchors_are_counted(newer, data, unpack, pack, refusal):
    """A plan that leaves them out takes more than it says."""
    tensors, metadata = unpack(data)
    resident = metadata["bytes"]["resident"]
    metadata["bytes"]["resident"] -= 2
    assert f": bytes.resident is {resident - 2}, expected {resident} " in refusal(pack(tensors, metadata))


@pytest.mark.parametrize(
    ("head_dim", "bits", "expected"),
    [
        (7, 4, "a multiple of 2 for int4"),
        (130, 4, "a multiple of 6 for int4"),
        (514, 4, "at most 512"),
        (12, 3, "a multiple of 8 for int3"),
        (6, 2, "a multiple of 4 for int2"),
        (168, 65, "a multiple of 16 for mix1"),  # but of 24, as int3 asks
    ],
)
def test_head_dims_that_do_not_split(make_artifact, head_dim, bits, expected):
    artifact = make_artifact(
        head_dim=head_dim, windows=(0,), num_kv_heads=2, bits=((bits, None), (4, 4)), choices=(("full", 64),)
    )
    with pytest.raises(ArtifactError, match=rf"model\.head_dim is {head_dim}, expected .*{expected}"):
        validate(artifact, "x")


def test_a_huge_matrix_is_not_decomposed(make_artifact):
    """An hour's work for whoever checks its singular values; it is refused by its size."""
    artifact = make_artifact(windows=(0,), num_kv_heads=1, bits=((4, None),), choices=(("full", 64),))
    side = 2**13
    huge = replace(artifact.quantiser, key_transform=np.ones((1, 1, side, side), np.float16))
    wide = replace(artifact, model=replace(artifact.model, head_dim=side), quantiser=huge)
    with pytest.raises(ArtifactError, match=r"model\.head_dim is 8192"):
        validate(wide, "x")


def test_many_numbers_that_are_not_finite_take_little_memory(artifact):
    nothing = np.broadcast_to(np.float32(np.nan), (2**22,))
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=r"profile\.x has nan at \[0\]"):
        validate(replace(artifact, profile={"x": nothing}), "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * nothing.size
