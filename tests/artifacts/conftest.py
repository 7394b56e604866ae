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
    Target,
    from_bytes,
    full_bytes,
    resident_bytes,
    to_bytes,
)


def build_artifact(
    *,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    windows: tuple[int, ...] = (0, 0, 16),
    context: int = 64,
    batch: int = 1,
    dtype: str = "float16",
    choices: tuple[tuple[str, int], ...] = (("full", 64), ("recent", 20), ("h2o", 24), ("snapkv", 1)),
) -> Artifact:
    """An artifact whose heads take `choices` (policy, capacity) in turn; sliding layers keep their window."""
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
    bits = np.full(shape, DTYPE_BITS[dtype], np.uint8)
    order = np.stack([np.roll(np.arange(num_kv_heads, dtype=np.int32), layer) for layer in range(num_layers)])
    budgets = Budgets(policy, capacity, sink, recent, bits, bits.copy(), order)
    samples = np.linspace(-1, 1, 33, dtype=np.float32)
    model = ModelIdentity(
        "tiny", "llama", num_layers, 2 * num_kv_heads, num_kv_heads, head_dim, 32, windows, dtype, "ab" * 32, samples
    )
    resident = batch * resident_bytes(budgets, head_dim, DTYPE_BITS[dtype])
    transient = 2 * context * num_kv_heads * head_dim * DTYPE_BITS[dtype] // 8 * batch
    return Artifact(
        model=model,
        target=Target(resident + 5, context, batch, dtype),
        bytes=ByteAccount(resident, 0, transient, batch * full_bytes(model, context, dtype)),
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
    )


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
    for name in vars(one.budgets):
        a, b = getattr(one.budgets, name), getattr(other.budgets, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for name in ("model", "target", "bytes", "solver", "calibration", "versions"):
        assert getattr(one, name) == getattr(other, name)
    np.testing.assert_array_equal(one.predicted_loss, other.predicted_loss)
    np.testing.assert_array_equal(one.model.samples, other.model.samples)
    assert set(one.profile) == set(other.profile)
    for name, values in one.profile.items():
        assert values.dtype == other.profile[name].dtype
        np.testing.assert_array_equal(values, other.profile[name])


@pytest.fixture(scope="session")
def make_artifact() -> Callable[..., Artifact]:
    """Builds a small valid artifact; keywords are those of `build_artifact`."""
    return build_artifact


@pytest.fixture(scope="session")
def artifact() -> Artifact:
    """The default small valid artifact: 3 layers of 2 heads, every policy, the last layer sliding."""
    return build_artifact()


@pytest.fixture(scope="session")
def unpack() -> Callable[[bytes], tuple[dict[str, np.ndarray], dict[str, Any]]]:
    return unpack_file


@pytest.fixture(scope="session")
def pack() -> Callable[[dict[str, np.ndarray], object], bytes]:
    return pack_file


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
