"""A small valid artifact, and ways to bend one."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from kvcompile.artifacts import (
    DTYPE_BITS,
    POLICIES,
    Artifact,
    ArtifactError,
    Budgets,
    ByteAccount,
    ModelIdentity,
    Quantiser,
    Scorer,
    Target,
    from_bytes,
    full_bytes,
    loaded_bytes,
    resident_bytes,
    to_bytes,
)
from kvcompile.kernels.codecs import CODECS


def build_artifact(
    *,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    hidden_size: int = 32,
    windows: tuple[int, ...] = (0, 0, 16),
    context: int = 64,
    batch: int = 1,
    dtype: str = "float16",
    choices: tuple[tuple[str, int], ...] = (("full", 64), ("recent", 20), ("h2o", 24), ("snapkv", 1)),
    bits: tuple[tuple[int | None, int | None], ...] = ((None, None),),
    ranks: int | None = None,
) -> Artifact:
    """An artifact whose heads take `choices` (policy, capacity) and `bits` (of keys and values; None: the cache's own)
    in turn; sliding layers keep their window. It has a scorer or a quantiser where a head needs one."""
    num_layers = len(windows)
    shape = (num_layers, num_kv_heads)
    policy, capacity = np.zeros(shape, np.uint8), np.zeros(shape, np.int32)
    sink, recent = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    turn = 0
    for layer, window in enumerate(windows):
        for head in range(num_kv_heads):
            name, tokens = choices[turn % len(choices)]
            turn += 1
            tokens = context if name == "full" else min(tokens, context)
            sinks = min(4, tokens - 1)
            if 0 < window < context:
                name, tokens, sinks = "recent", window, 0
            rest = tokens - sinks
            at = layer, head
            policy[at], capacity[at], sink[at] = POLICIES.index(name), tokens, sinks
            recent[at] = rest if name in ("full", "recent") else (rest + 1) // 2
    own = DTYPE_BITS[dtype]
    k_bits, v_bits = (np.resize(np.array([pair[side] or own for pair in bits], np.uint8), shape) for side in (0, 1))
    order = np.stack([np.roll(np.arange(num_kv_heads, dtype=np.int32), layer) for layer in range(num_layers)])
    budgets = Budgets(policy, capacity, sink, recent, k_bits, v_bits, order)
    scorer = build_scorer(*shape, hidden_size) if (policy == POLICIES.index("scored")).any() else None
    quantised = np.isin([k_bits, v_bits], list(CODECS)).any()
    quantiser = build_quantiser(*shape, head_dim) if quantised else None
    samples = np.linspace(-1, 1, 33, dtype=np.float32)
    model = ModelIdentity(
        "tiny", "llama", num_layers, 2 * num_kv_heads, num_kv_heads, head_dim, hidden_size, windows, dtype,
        "ab" * 32, samples,
    )  # fmt: skip
    resident = batch * resident_bytes(budgets, head_dim, DTYPE_BITS[dtype])
    transient = 2 * context * num_kv_heads * head_dim * DTYPE_BITS[dtype] // 8 * batch
    return Artifact(
        model=model,
        target=Target(resident + 5, context, batch, dtype),
        bytes=ByteAccount(
            resident, loaded_bytes(scorer, quantiser), transient, batch * full_bytes(model, context, dtype)
        ),
        budgets=budgets,
        predicted_loss=0.125,
        solver={"name": "uniform", "nested": [1, 2.5, None, {"é": True}]},
        calibration={"sources": ["stdlib"], "seed": 0},
        versions={"kvcompile": "0.1.0"},
        profile={
            "tokens": np.array([4, 8], np.int32),
            "recent_loss": np.linspace(0, 1, num_layers * num_kv_heads * 2, dtype=np.float32).reshape(*shape, 2),
            "half": np.array(0.5, np.float16),
            "codes": np.zeros((0, 3), np.uint8),
        },
        scorer=scorer,
        quantiser=quantiser,
        rank=None if ranks is None else np.resize(np.arange(ranks, dtype=np.int32) % num_kv_heads, shape),
    )


def build_scorer(num_layers: int, num_kv_heads: int, hidden_size: int) -> Scorer:
    """A scorer whose numbers all differ, as far as float16 can tell them apart."""
    shape = (num_layers, num_kv_heads)
    weight = np.linspace(-1, 1, num_layers * num_kv_heads * hidden_size).reshape(*shape, hidden_size)
    return Scorer(weight.astype(np.float16), np.linspace(-9, -1, weight[..., 0].size, dtype=np.float32).reshape(shape))


def build_quantiser(num_layers: int, num_kv_heads: int, head_dim: int) -> Quantiser:
    """Well-conditioned matrices of every head: orthogonal ones, their rows stretched between 1 and 2."""
    rng = np.random.default_rng(0)
    square = (2, num_layers, num_kv_heads, head_dim, head_dim)
    transform = np.linalg.qr(rng.normal(size=square))[0] * np.linspace(1, 2, head_dim)[:, None]
    mean = rng.normal(size=square[:-1])
    key_transform, value_transform = transform.astype(np.float16)
    key_mean, value_mean = mean.astype(np.float16)
    return Quantiser(key_transform, key_mean, value_transform, value_mean)


def unpack_file(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A file's tensors and its metadata object, as anyone may take them out."""
    length = struct.unpack("<Q", data[:8])[0]
    return dict(load(data)), json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["kvcompile"])


def pack_file(tensors: dict[str, np.ndarray], metadata: object) -> bytes:
    """A file of valid structure around any tensors and metadata; Python's json writes NaN where it is told to."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    return save({k: np.ascontiguousarray(v) if v.ndim else v for k, v in tensors.items()}, {"kvcompile": text})


def assert_same_artifact(one: Artifact, other: Artifact) -> None:
    """Equal in every field, element types and read-only arrays included."""
    assert to_bytes(one) == to_bytes(other)
    for part in ("budgets", "scorer", "quantiser"):
        values, others = (getattr(artifact, part) for artifact in (one, other))
        assert type(values) is type(others)
        for name in () if values is None else vars(values):
            assert_same_array(getattr(values, name), getattr(others, name))
    assert (one.rank is None) == (other.rank is None)
    if one.rank is not None:
        assert_same_array(one.rank, other.rank)
    for name in ("model", "target", "bytes", "solver", "calibration", "versions"):
        assert getattr(one, name) == getattr(other, name)
    np.testing.assert_array_equal(one.predicted_loss, other.predicted_loss)
    np.testing.assert_array_equal(one.model.samples, other.model.samples)
    assert set(one.profile) == set(other.profile)
    for name, values in one.profile.items():
        assert_same_array(values, other.profile[name])


def assert_same_array(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="session")
def make_artifact() -> Callable[..., Artifact]:
    """Builds a small valid artifact; keywords are those of `build_artifact`."""
    return build_artifact


@pytest.fixture(scope="session")
def artifact() -> Artifact:
    """The default small valid artifact: 3 layers of 2 heads, every policy, the last layer sliding."""
    return build_artifact()


@pytest.fixture(scope="session")
def newer() -> Artifact:
    """The default small valid artifact of version 2: scored heads, every width, two ranks."""
    return build_artifact(
        windows=(0, 16),
        choices=(("scored", 20), ("h2o", 24)),
        bits=((4, 8), (None, 4), (8, None)),
        hidden_size=6,
        ranks=2,
    )


@pytest.fixture(scope="session")
def unpack() -> Callable[[bytes], tuple[dict[str, np.ndarray], dict[str, Any]]]:
    return unpack_file


@pytest.fixture(scope="session")
def pack() -> Callable[[dict[str, np.ndarray], object], bytes]:
    return pack_file


@pytest.fixture(scope="module")
def data(artifact: Artifact) -> bytes:
    """The artifact as a file."""
    return to_bytes(artifact)


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Artifact, Artifact], None]:
    return assert_same_artifact


@pytest.fixture(scope="session")
def refusal() -> Callable[[bytes], str]:
    """The one sentence with which the reader refuses a file's bytes."""

    def sentence(data: bytes) -> str:
        with pytest.raises(ArtifactError) as caught:
            from_bytes(data, "bad.kvb")
        message = str(caught.value)
        assert message.startswith("bad.kvb: ")
        assert message.isprintable()
        return message

    return sentence
