"""Every check on an artifact's values: `read` ends with them and `write` begins with them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts.checks import (
    DTYPES,
    MAX_BATCH,
    MAX_BYTES,
    MAX_TOKENS,
    printable,
    refuse,
    require_array,
    require_dtype,
    require_finite,
    require_integer,
    require_text,
    show,
)
from kvcompile.artifacts.errors import ArtifactError
from kvcompile.artifacts.parts import check_parts
from kvcompile.artifacts.schema import (
    DTYPE_BITS,
    POLICIES,
    Artifact,
    Budgets,
    ByteAccount,
    ModelIdentity,
    Target,
    chunk_of,
    full_bytes,
    loaded_bytes,
    resident_bytes,
    state_bytes,
    token_limits,
)
from kvcompile.kernels.codecs import CODECS

BUDGET_TENSORS = {
    "policy": "U8",
    "capacity": "I32",
    "sink": "I32",
    "recent": "I32",
    "k_bits": "U8",
    "v_bits": "U8",
    "head_order": "I32",
}
"""The fields of `Budgets`, all [num_layers, num_kv_heads]."""

MODEL_LIMITS = {
    "num_layers": 1024,
    "num_attention_heads": 2**16,
    "num_kv_heads": 1024,
    "head_dim": 2**16,
    "hidden_size": 2**24,
}


def validate(artifact: Artifact, source: str) -> None:
    """Check every value of an artifact; `source` is the file's name for the message.

    Raises ArtifactError: one sentence that names the file, the field, what was found and what was expected.
    """
    source = printable(source)
    check_model(artifact.model, source)
    _check_target(artifact.target, chunk_of(artifact.model), source)
    for name in ("resident", "scorer", "transient", "full"):
        require_integer(source, f"bytes.{name}", getattr(artifact.bytes, name), 0, MAX_BYTES)
    _check_reports(artifact, source)
    _check_samples(artifact.model.samples, source)
    for name, values in artifact.profile.items():
        _check_profile(name, values, source)
    _check_shapes(artifact.budgets, artifact.model, source)
    _check_budgets(artifact, source)
    check_parts(artifact, source)
    _check_bytes(artifact.bytes, artifact, source)


def check_model(model: ModelIdentity, source: str) -> None:
    """Check every value of a model's identity but its samples. Raises as `validate` does."""
    require_text(source, "model.name", model.name)
    require_text(source, "model.architecture", model.architecture)
    require_dtype(source, "model.dtype", model.dtype)
    for name, limit in MODEL_LIMITS.items():
        require_integer(source, f"model.{name}", getattr(model, name), 1, limit)
    if model.num_attention_heads % model.num_kv_heads:
        found = f"is {model.num_kv_heads}, expected a divisor of num_attention_heads {model.num_attention_heads}"
        refuse(source, "model.num_kv_heads", found)
    if not isinstance(model.windows, tuple) or len(model.windows) != model.num_layers:
        refuse(source, "model.windows", f"is {show(model.windows)}, expected {model.num_layers} integers")
    for layer, window in enumerate(model.windows):
        require_integer(source, f"model.windows[{layer}]", window, 0, MAX_TOKENS)
    if not isinstance(model.states, tuple) or len(model.states) != 2:
        refuse(source, "model.states", f"is {show(model.states)}, expected 2 integers")
    for place, elements in enumerate(model.states):
        require_integer(source, f"model.states[{place}]", elements, 0, MAX_BYTES // 8)
    if not isinstance(model.fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", model.fingerprint):
        refuse(source, "model.fingerprint", f"is {show(model.fingerprint)}, expected 64 lower-case hex digits")


def _check_target(target: Target, chunk: int | None, source: str) -> None:
    require_integer(source, "target.bytes", target.bytes, 1, MAX_BYTES)
    require_integer(source, "target.context", target.context, 1, chunk or MAX_TOKENS)
    require_integer(source, "target.batch", target.batch, 1, MAX_BATCH)
    require_dtype(source, "target.dtype", target.dtype)


def _check_reports(artifact: Artifact, source: str) -> None:
    loss = artifact.predicted_loss
    if not isinstance(loss, float) or np.isinf(loss):
        refuse(source, "predicted_loss", f"is {show(loss)}, expected a finite number or NaN")
    for name in ("solver", "calibration", "versions"):
        _check_json(source, name, getattr(artifact, name))
    for key, version in artifact.versions.items():
        require_text(source, f"versions[{show(key)}]", version)


def _check_json(source: str, field: str, value: object) -> None:
    if not isinstance(value, Mapping):
        refuse(source, field, f"is {show(value)}, expected a JSON object")
    try:
        json.dumps(dict(value), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = printable(str(error))
        raise ArtifactError(f"{source}: {field} is no JSON object of finite numbers and text: {reason}") from error


def _check_samples(samples: NDArray[np.float32], source: str) -> None:
    require_array(source, "fingerprint.samples", samples, ("F32",))
    if samples.ndim != 1 or not samples.size:
        refuse(source, "tensor fingerprint.samples", f"has the shape {list(samples.shape)}, expected [N] with N >= 1")
    require_finite(source, "fingerprint.samples", samples)


def _check_profile(name: str, values: NDArray[Any], source: str) -> None:
    require_text(source, "the name of a profile tensor", name)
    require_array(source, f"profile.{name}", values, tuple(DTYPES))
    require_finite(source, f"profile.{name}", values)
    # The one tensor of a profile that is looked at without the others: of an older quantiser it gives the positions.
    if name == "window" and values.shape != (1,):
        refuse(source, "tensor profile.window", f"has the shape {list(values.shape)}, expected [1]")


def _check_shapes(budgets: Budgets, model: ModelIdentity, source: str) -> None:
    shape = (model.num_layers, model.num_kv_heads)
    for name, dtype in BUDGET_TENSORS.items():
        values = getattr(budgets, name)
        require_array(source, name, values, (dtype,))
        if values.shape != shape:
            problem = f"has the shape {list(values.shape)}, expected [num_layers, num_kv_heads] = {list(shape)}"
            refuse(source, f"tensor {name}", problem)


def _check_budgets(artifact: Artifact, source: str) -> None:
    budgets, model, target = artifact.budgets, artifact.model, artifact.target
    limits = token_limits(model.windows, target.context)
    # Lists hold Python ints, in which no sum or product of found numbers can overflow.
    tables = {name: getattr(budgets, name).tolist() for name in BUDGET_TENSORS}
    order = tables.pop("head_order")
    for layer, limit in enumerate(limits):
        for head in range(model.num_kv_heads):
            row = {name: table[layer][head] for name, table in tables.items()}
            _check_head(row, f"[{layer}, {head}]", limit, limit < target.context, target.dtype, source)
        if sorted(order[layer]) != list(range(model.num_kv_heads)):
            problem = f"is {show(order[layer])}, expected a permutation of 0 to {model.num_kv_heads - 1}"
            refuse(source, f"head_order[{layer}]", problem)


def _check_head(row: dict[str, int], at: str, limit: int, sliding: bool, dtype: str, source: str) -> None:
    if row["policy"] >= len(POLICIES):
        known = ", ".join(f"{code} ({name})" for code, name in enumerate(POLICIES))
        refuse(source, f"policy{at}", f"is {row['policy']}, expected one of {known}")
    policy, capacity, sink, recent = POLICIES[row["policy"]], row["capacity"], row["sink"], row["recent"]
    for name in ("k_bits", "v_bits"):
        if row[name] not in (*CODECS, DTYPE_BITS[dtype]):
            # Of codecs that are there to be measured alone no file should be made.
            in_files = [id for id, codec in sorted(CODECS.items()) if codec.format_version]
            expected = ", ".join(map(str, [*in_files, DTYPE_BITS[dtype]]))
            refuse(source, f"{name}{at}", f"is {row[name]}, expected one of {expected} for a {dtype} cache")
    if not 1 <= capacity <= limit:
        refuse(source, f"capacity{at}", f"is {capacity}, expected 1 to {limit} tokens")
    if sink < 0:
        refuse(source, f"sink{at}", f"is {sink}, expected 0 or more tokens")
    if recent < 1:
        refuse(source, f"recent{at}", f"is {recent}, expected 1 token or more")
    if sink + recent > capacity:
        refuse(source, f"sink{at} + recent{at}", f"is {sink} + {recent}, expected at most the capacity {capacity}")
    if sliding and policy != "recent":
        refuse(source, f"policy{at}", f"is {policy}, expected recent in a sliding-window layer")
    if (sliding or policy == "full") and capacity != limit:
        refuse(source, f"capacity{at}", f"is {capacity}, expected all {limit} tokens of the layer")
    if sliding and sink:
        refuse(source, f"sink{at}", f"is {sink}, expected 0 in a sliding-window layer")
    if policy in ("full", "recent") and sink + recent != capacity:
        refuse(source, f"recent{at}", f"is {recent}, expected capacity - sink = {capacity - sink} with policy {policy}")


def _check_bytes(account: ByteAccount, artifact: Artifact, source: str) -> None:
    model, target = artifact.model, artifact.target
    held = resident_bytes(artifact.budgets, model.head_dim, DTYPE_BITS[target.dtype])
    token = 2 * model.num_kv_heads * model.head_dim * DTYPE_BITS[target.dtype] // 8
    expected = {
        "resident": (held + state_bytes(model, target.dtype)) * target.batch,
        "scorer": loaded_bytes(artifact.scorer, artifact.quantiser),
        "transient": token * target.context * target.batch,
        "full": full_bytes(model, target.context, target.dtype) * target.batch,
    }
    for name, value in expected.items():
        found = getattr(account, name)
        if found != value:
            refuse(source, f"bytes.{name}", f"is {found}, expected {value} for these budgets")
    if account.resident > target.bytes:
        refuse(source, "bytes.resident", f"is {account.resident}, expected at most target.bytes {target.bytes}")
