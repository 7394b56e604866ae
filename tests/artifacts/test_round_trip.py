"""What is written is what is read, and the same artifact is the same bytes."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kvcompile.artifacts.checks as checks
from kvcompile.artifacts import POLICIES, ArtifactError, from_bytes, loaded_bytes, read, to_bytes, write
from kvcompile.kernels.codecs import CODECS

choices = st.lists(st.tuples(st.sampled_from(POLICIES), st.integers(1, 200)), min_size=1, max_size=5).map(tuple)


def widths(ids):
    return st.lists(st.tuples(*[st.sampled_from([*ids, None])] * 2), min_size=1, max_size=4).map(tuple)


# With sizes of heads that hold these codecs.
stored = st.one_of(
    st.tuples(st.sampled_from([2, 6, 8, 128]), widths([8, 4])),
    st.tuples(st.sampled_from([16, 128, 192]), widths(CODECS)),
)
profiles = st.dictionaries(
    st.text("abcxyz_.0é", min_size=1, max_size=12),
    st.sampled_from([np.float32, np.float16, np.int32, np.uint8]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            elements={"allow_nan": False, "allow_infinity": False} if np.dtype(dtype).kind == "f" else None,
        )
    ),
    max_size=4,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé\n\"'\\"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    num_kv_heads=st.integers(1, 5),
    hidden_size=st.integers(1, 9),
    windows=st.lists(st.sampled_from([0, 1, 16, 500]), min_size=1, max_size=4).map(tuple),
    context=st.integers(1, 200),
    batch=st.integers(1, 3),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    choices=choices,
    stored=stored,
    ranks=st.none() | st.integers(1, 5),
    profile=profiles,
    solver=st.dictionaries(st.text(max_size=4), json_values, max_size=3),
    loss=st.floats(allow_infinity=False),
)
def test_round_trip(make_artifact, assert_same, stored, profile, solver, loss, **shape):
    head_dim, bits = stored
    artifact = make_artifact(head_dim=head_dim, bits=bits, **shape)
    artifact = replace(artifact, profile=profile, solver=solver, predicted_loss=loss)
    assert_same(from_bytes(to_bytes(artifact), "x"), artifact)


def test_odd_head_dims_where_nothing_is_quantised(make_artifact, assert_same):
    for head_dim in (1, 65, 1000):
        artifact = make_artifact(head_dim=head_dim, windows=(0,), choices=(("scored", 9),))
        assert_same(from_bytes(to_bytes(artifact), "x"), artifact)


@pytest.mark.parametrize("kept", [(), ("scorer",), ("quantiser",), ("rank",), ("scorer", "quantiser", "rank")])
def test_any_part_alone_and_the_lowest_version_that_holds_it(make_artifact, newer, assert_same, unpack, kept):
    """Heads that are neither scored nor quantised need no part, but may have it: another plan can be solved from it."""
    plain = make_artifact(windows=(0, 16), hidden_size=6)
    parts = {name: getattr(newer, name) for name in kept}
    account = replace(plain.bytes, scorer=loaded_bytes(parts.get("scorer"), parts.get("quantiser")))
    artifact = replace(plain, bytes=account, **parts)
    data = to_bytes(artifact)
    assert_same(from_bytes(data, "x"), artifact)
    assert unpack(data)[1]["format_version"] == (2 if kept else 1)


@pytest.mark.parametrize("bits", [2, 3, 65, 66, 67])
def test_few_bits_are_in_files_of_version_3_alone(make_artifact, assert_same, unpack, refusal, bits):
    artifact = make_artifact(head_dim=16, bits=((8, bits), (bits, None)))
    data = to_bytes(artifact)
    assert_same(from_bytes(data, "x"), artifact)
    assert unpack(data)[1]["format_version"] == 3
    older = data.replace(b'\\"format_version\\":3', b'\\"format_version\\":2')
    assert f"is {bits}, expected a file of version 3 with it" in refusal(older)


def test_ranks_of_unequal_number(newer, assert_same):
    artifact = replace(newer, rank=np.ones_like(newer.rank))
    assert_same(from_bytes(to_bytes(artifact), "x"), artifact)


def test_through_a_file(artifact, assert_same, tmp_path):
    path = tmp_path / "a.kvb"
    write(artifact, path)
    assert_same(read(path), artifact)
    assert_same(read(str(path)), artifact)


def test_transforms_may_lie_in_any_order_in_memory(newer):
    quantiser = newer.quantiser
    turned = np.asfortranarray(quantiser.key_transform)
    assert to_bytes(replace(newer, quantiser=replace(quantiser, key_transform=turned))) == to_bytes(newer)


def test_profile_layout_does_not_matter(artifact, assert_same):
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    transposed = replace(artifact, profile={"a": values.T})
    plain = replace(artifact, profile={"a": values.T.copy()})
    assert to_bytes(transposed) == to_bytes(plain)
    assert_same(from_bytes(to_bytes(transposed), "x"), transposed)


def test_same_bytes_whatever_the_order_of_keys(artifact):
    backwards = replace(
        artifact,
        solver=dict(reversed(artifact.solver.items())),
        profile=dict(reversed(artifact.profile.items())),
    )
    assert to_bytes(backwards) == to_bytes(artifact)


def test_same_bytes_in_another_process(artifact, tmp_path):
    path = tmp_path / "a.kvb"
    write(artifact, path)
    script = "import sys; from kvcompile.artifacts import read, write; write(read(sys.argv[1]), sys.argv[2])"
    subprocess.run([sys.executable, "-c", script, path, tmp_path / "b.kvb"], check=True)
    assert path.read_bytes() == (tmp_path / "b.kvb").read_bytes()


def test_no_predicted_loss_is_null(artifact, unpack):
    data = to_bytes(replace(artifact, predicted_loss=math.nan))
    assert unpack(data)[1]["predicted_loss"] is None
    assert math.isnan(from_bytes(data, "x").predicted_loss)


def test_import_is_light():
    script = "import sys, kvcompile.artifacts; print(*sorted({'torch', 'scipy', 'click', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == ""


def test_a_wrong_artifact_is_not_written(artifact, tmp_path):
    bad = replace(artifact, bytes=replace(artifact.bytes, resident=1))
    with pytest.raises(ArtifactError, match=r"bytes\.resident is 1"):
        write(bad, tmp_path / "a.kvb")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"solver": {"x": math.inf}}, "solver"),
        ({"calibration": {"x": object()}}, "calibration"),
        ({"calibration": {"x": "\ud800"}}, "calibration"),
        ({"calibration": [1]}, "calibration"),
        ({"versions": {"x": 1}}, "versions"),
        ({"predicted_loss": np.float32(1)}, "predicted_loss"),
        ({"profile": {"x": np.zeros(3)}}, r"profile\.x"),
        ({"profile": {"x": [1.0]}}, r"profile\.x"),
        ({"profile": {"a\nb": np.zeros(3, np.float32)}}, "profile"),
        ({"profile": {"x": np.array([1, np.nan], np.float16)}}, r"profile\.x"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(artifact, tmp_path, change, field):
    with pytest.raises(ArtifactError, match=field) as caught:
        write(replace(artifact, **change), tmp_path / "a.kvb")
    assert str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


def test_a_file_too_large_to_be_read_is_not_written(newer, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ArtifactError, match=r"a\.kvb: the file has .* bytes, expected at most 1000"):
        write(newer, tmp_path / "a.kvb")
    assert list(tmp_path.iterdir()) == []


def test_numpy_integers_and_wide_arrays_are_not_written(artifact, tmp_path):
    with pytest.raises(ArtifactError, match=r"target\.context"):
        write(replace(artifact, target=replace(artifact.target, context=np.int64(64))), tmp_path / "a.kvb")
    wide = replace(artifact.budgets, capacity=artifact.budgets.capacity.astype(np.int64))
    with pytest.raises(ArtifactError, match=r"capacity.*int64.*expected I32"):
        write(replace(artifact, budgets=wide), tmp_path / "a.kvb")
