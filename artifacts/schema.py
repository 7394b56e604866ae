"""The values that an artifact holds. Plain, immutable, numpy only: compiler and runtime meet here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1

POLICIES = ("full", "recent", "h2o", "snapkv")
"""Token policies; a policy's code in the file is its place here, so names are only ever appended."""

DTYPE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
"""Cache element types by torch's name, and their bits."""

STATE_BYTES = {"full": 0, "recent": 0, "h2o": 8, "snapkv": 0}
"""Bytes that a policy keeps beside K and V for each slot: h2o, one f32 score and one i32 position."""


@dataclass(frozen=True)
class ModelIdentity:
    """Which model an artifact is for.

    `windows` has one entry a layer: the width in tokens of its sliding window, 0 for full attention.
    `fingerprint` is 32 hex digits over the names and shapes of all tensors, then 32 over a sample of each; `samples`
    (f32, flat) are those numbers, so that the same weights in another dtype are still recognised.
    """

    name: str
    architecture: str
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    windows: tuple[int, ...]
    dtype: str
    fingerprint: str
    samples: NDArray[np.float32] = field(compare=False)


@dataclass(frozen=True)
class Target:
    """What was asked for: `bytes` for `batch` sequences of `context` tokens, elements of `dtype`."""

    bytes: int
    context: int
    batch: int
    dtype: str


@dataclass(frozen=True)
class ByteAccount:
    """Bytes for the whole batch: `resident` is what a cache holds, `scorer` the scorer's weights (loaded once),
    `transient` one layer's K and V during prefill, `full` the resident bytes of the full cache."""

    resident: int
    scorer: int
    transient: int
    full: int


@dataclass(frozen=True)
class Budgets:
    """One choice a KV head. Every array is [num_layers, num_kv_heads], indexed by the model's own head numbers,
    but for `head_order`, which maps storage position -> KV head.

    A head stores `capacity` tokens: the first `sink` and the last `recent` are protected, the others are kept by the
    policy's score; `sink + recent <= capacity` and `recent >= 1`.
    """

    policy: NDArray[np.uint8]
    capacity: NDArray[np.int32]
    sink: NDArray[np.int32]
    recent: NDArray[np.int32]
    k_bits: NDArray[np.uint8]
    v_bits: NDArray[np.uint8]
    head_order: NDArray[np.int32]


@dataclass(frozen=True)
class Artifact:
    """A whole `.kvb` file. `profile` maps a name without its `profile.` prefix to an array; `solver`, `calibration`
    and `versions` are JSON objects that the runtime does not read."""

    model: ModelIdentity
    target: Target
    bytes: ByteAccount
    budgets: Budgets
    predicted_loss: float
    solver: Mapping[str, Any]
    calibration: Mapping[str, Any]
    versions: Mapping[str, str]
    profile: Mapping[str, NDArray[Any]]


def slot_bytes(policy: str, head_dim: int, k_bits: int, v_bits: int) -> int:
    """Bytes that one token of one KV head takes in the store, exactly as the runtime allocates them."""
    return head_dim * (k_bits + v_bits) // 8 + STATE_BYTES[policy]


def resident_bytes(budgets: Budgets, head_dim: int) -> int:
    """Bytes of one sequence's cache under these budgets."""
    per_head = zip(budgets.policy.flat, budgets.capacity.flat, budgets.k_bits.flat, budgets.v_bits.flat, strict=True)
    return sum(int(c) * slot_bytes(POLICIES[p], head_dim, int(k), int(v)) for p, c, k, v in per_head)


def token_limits(windows: tuple[int, ...], context: int) -> tuple[int, ...]:
    """Most tokens a head of each layer can ever use at this context: the context, or a narrower sliding window."""
    return tuple(min(w, context) if w else context for w in windows)


def full_bytes(model: ModelIdentity, context: int, dtype: str) -> int:
    """Bytes of one sequence's full cache: every layer's limit, sliding layers counted by their window."""
    bits = DTYPE_BITS[dtype]
    slots = sum(token_limits(model.windows, context)) * model.num_kv_heads
    return slots * slot_bytes("full", model.head_dim, bits, bits)
