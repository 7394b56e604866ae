"""The values that an artifact holds. Plain, immutable, numpy only: compiler and runtime meet here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.kernels.codecs import CODECS, codec_of, is_quantised

POLICIES = ["full", "recent", "h2o", "snapkv", "scored"]
"""Token policies; a policy's code in the file is its place here, so names are only ever appended. Codes from 5 on are
those of `register_policy`, and mean nothing to readers that have not registered the same."""

DTYPE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
"""Cache dtypes by torch's name, and their bits. `k_bits` and `v_bits` of a head are these of the target's dtype, or the
id of a codec (`kvcompile.kernels.codecs`)."""

STATE_BYTES = {"full": 0, "recent": 0, "h2o": 8, "snapkv": 0, "scored": 2}
"""Bytes that a policy keeps beside K and V for each slot: h2o, one f32 score and one i32 position; scored, one f16
score."""


def register_policy(name: str, state_bytes: int) -> None:
    """Append a token policy from outside of the package, with the bytes that it keeps for each slot beside K and V;
    `kvcompile.runtime.policies.register` calls this. The same one may be registered again.

    Raises:
        ValueError: a name that is taken by a policy of other bytes.
    """
    if name in POLICIES and STATE_BYTES[name] != state_bytes:
        raise ValueError(f"the token policy {name} is taken, with {STATE_BYTES[name]} bytes a slot")
    if name not in POLICIES:
        POLICIES.append(name)
        STATE_BYTES[name] = state_bytes


@dataclass(frozen=True)
class ModelIdentity:
    """Which model an artifact is for.

    `num_layers` counts the layers that a plan is for (`is_planned`), and `windows` has one entry for each: the width in
    tokens of its sliding window, or of its chunks (`chunk_of`), 0 for full attention. `states` is what one sequence
    takes in the others, which have neither budgets nor a number here: elements in the cache dtype, and in float32.
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
    states: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Target:
    """What was asked for: `bytes` for `batch` sequences of `context` tokens, elements of `dtype`."""

    bytes: int
    context: int
    batch: int
    dtype: str


@dataclass(frozen=True)
class ByteAccount:
    """Bytes for the whole batch: `resident` is what a cache holds, `transient` one layer's K and V during prefill
    (`prefill_bytes` has all that a prefill takes), `full` the resident bytes of the full cache. `scorer` is the scorer
    and the quantiser, loaded once whatever the batch."""

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
class Scorer:
    """The compiled scorer of the policy `scored`: the log utility of a token for KV head h of layer l is
    `weight[l, h] @ x + bias[l, h]`, where x is the input of the layer's attention block (after its norm).

    `weight` f16 [L, H, hidden_size], `bias` f32 [L, H].
    """

    weight: NDArray[np.float16]
    bias: NDArray[np.float32]


@dataclass(frozen=True)
class Quantiser:
    """How keys (RoPE applied) and values are transformed before they are quantised: y = transform @ (x - mean), and
    back x = inverse(transform) @ y + mean. The runtime applies the inverse to queries and attention outputs instead of
    to stored tokens. Keys or values of a head that are not quantised are stored as they are.

    `key_transform`, `value_transform` f16 [L, H, head_dim, head_dim], invertible; `key_mean`, `value_mean` f16
    [L, H, head_dim].
    """

    key_transform: NDArray[np.float16]
    key_mean: NDArray[np.float16]
    value_transform: NDArray[np.float16]
    value_mean: NDArray[np.float16]


@dataclass(frozen=True)
class Artifact:
    """A whole `.kvb` file. A head of policy `scored` needs `scorer`, one with a codec that takes a transform needs
    `quantiser`; both may be given without. `rank` i32 [L, H] is the tensor-parallel rank of every head where the
    plan was placed on several, else None. `profile` maps a name without its `profile.` prefix to an array; `solver`,
    `calibration` and `versions` are JSON objects that the runtime does not read."""

    model: ModelIdentity
    target: Target
    bytes: ByteAccount
    budgets: Budgets
    predicted_loss: float
    solver: Mapping[str, Any]
    calibration: Mapping[str, Any]
    versions: Mapping[str, str]
    profile: Mapping[str, NDArray[Any]]
    scorer: Scorer | None = None
    quantiser: Quantiser | None = None
    rank: NDArray[np.int32] | None = None


STATES_VERSION = 4
"""The version that knows of layers of linear attention."""


def newest_version() -> int:
    """The newest version of the format that is known, with the codecs that are registered now."""
    return max([STATES_VERSION, *(codec.format_version for codec in CODECS.values())])


FORMAT_VERSION = newest_version()
"""The newest version known without codecs from outside of this package."""


def needed_version(artifact: Artifact) -> int:
    """The version that an artifact is written as, the lowest that knows all there is in it: 2 has scorers, quantisers
    and ranks, 4 states of linear attention, and every codec says for itself."""
    budgets = artifact.budgets
    used = {int(bits) for table in (budgets.k_bits, budgets.v_bits) for bits in np.unique(table) if is_quantised(bits)}
    parts = (artifact.scorer, artifact.quantiser, artifact.rank)
    own = STATES_VERSION if any(artifact.model.states) else 1
    return max([own, *(2 for part in parts if part is not None), *(codec_of(bits).format_version for bits in used)])


def vector_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one stored key or value: its elements of `bits` bits, or what the codec of that id takes."""
    return codec_of(bits).vector_bytes(head_dim) if is_quantised(bits) else head_dim * bits // 8


def slot_bytes(policy: str, head_dim: int, k_bits: int, v_bits: int) -> int:
    """Bytes that one token of one KV head takes in the store, exactly as the runtime allocates them."""
    return vector_bytes(head_dim, k_bits) + vector_bytes(head_dim, v_bits) + STATE_BYTES[policy]


def anchor_bytes(sink: int, head_dim: int, k_bits: int, v_bits: int, dtype_bits: int) -> int:
    """Bytes that a head takes beside its slots: token 0, which draws much attention from everywhere, is kept in the
    cache dtype too where the head has a sink and the codec of keys or values asks for it."""
    anchors = sum(is_quantised(bits) and codec_of(bits).needs_anchor for bits in (k_bits, v_bits))
    return min(sink, 1) * anchors * head_dim * dtype_bits // 8


def head_bytes(budgets: Any, head_dim: int, dtype_bits: int) -> NDArray[np.int64]:
    """Bytes of every head's cache, i64 [L, H], for one sequence; `budgets` are `Budgets`, or a plan, which has the same
    tables."""
    size = np.zeros(budgets.capacity.shape, np.int64)
    for at in np.ndindex(size.shape):
        k, v = int(budgets.k_bits[at]), int(budgets.v_bits[at])
        slots = int(budgets.capacity[at]) * slot_bytes(POLICIES[budgets.policy[at]], head_dim, k, v)
        size[at] = slots + anchor_bytes(int(budgets.sink[at]), head_dim, k, v, dtype_bits)
    return size


def resident_bytes(budgets: Budgets, head_dim: int, dtype_bits: int) -> int:
    """Bytes of one sequence's keys and values under these budgets; `dtype_bits` are those of the cache dtype."""
    tables = (budgets.policy, budgets.capacity, budgets.sink, budgets.k_bits, budgets.v_bits)
    rows = zip(*(table.ravel().tolist() for table in tables), strict=True)
    return sum(
        capacity * slot_bytes(POLICIES[policy], head_dim, k, v) + anchor_bytes(sink, head_dim, k, v, dtype_bits)
        for policy, capacity, sink, k, v in rows
    )


def token_limits(windows: tuple[int, ...], context: int) -> tuple[int, ...]:
    """Most tokens a head of each layer can ever use at this context: the context, or a narrower sliding window."""
    return tuple(min(w, context) if w else context for w in windows)


def chunk_of(model: ModelIdentity) -> int | None:
    """Tokens of the chunks in which some layers of a model attend; None where it has no such layers. Within the first
    chunk they are as layers of full attention, and so they are where a sequence is no longer than that."""
    return (max(model.windows) or None) if model.architecture == "llama4_text" else None


def state_bytes(model: ModelIdentity, dtype: str) -> int:
    """Bytes of one sequence in layers that a plan is not for, which every cache of this dtype has."""
    return model.states[0] * DTYPE_BITS[dtype] // 8 + model.states[1] * 4


def states_name(model: ModelIdentity) -> str:
    """What `states` counts in a model that has any: those of linear attention have a part in float32."""
    return "states of linear attention" if model.states[1] else "windows of layers that a plan leaves alone"


def full_bytes(model: ModelIdentity, context: int, dtype: str) -> int:
    """Bytes of one sequence's full cache: every layer's limit, sliding layers counted by their window, and states."""
    bits = DTYPE_BITS[dtype]
    slots = sum(token_limits(model.windows, context)) * model.num_kv_heads
    return slots * slot_bytes("full", model.head_dim, bits, bits) + state_bytes(model, dtype)


def loaded_bytes(scorer: Scorer | None, quantiser: Quantiser | None) -> int:
    """Bytes of the scorer's and the quantiser's tensors."""
    tensors = [value for part in (scorer, quantiser) if part is not None for value in vars(part).values()]
    return sum(int(tensor.nbytes) for tensor in tensors)
