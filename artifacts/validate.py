"""Every check on an artifact's values: `read` ends with them and `write` begins with them."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts.errors import ArtifactError
from kvcompile.artifacts.schema import (
    DTYPE_BITS,
    POLICIES,
    QUANTISED_BITS,
    Artifact,
    Budgets,
    ByteAccount,
    ModelIdentity,
    Quantiser,
    Scorer,
    Target,
    full_bytes,
    groups,
    loaded_bytes,
    resident_bytes,
    token_limits,
)

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
"""Element types that a file may hold, by safetensors' name."""

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

SCORER_TENSORS = {"weight": "F16", "bias": "F32"}
"""The fields of `Scorer`, in the file after `scorer.`."""

QUANTISER_TENSORS = {"key_transform": "F16", "key_mean": "F16", "value_transform": "F16", "value_mean": "F16"}
"""The fields of `Quantiser`, in the file after `quantiser.`."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2

MAX_CONDITION = 1e4
"""Largest ratio of a transform's singular values: beyond it half precision does not hold its inverse."""

MAX_TOKENS = 2**31 - 1
MAX_BYTES = 2**63 - 1
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
    _check_model(artifact.model, source)
    _check_target(artifact.target, source)
    for name in ("resident", "scorer", "transient", "full"):
        require_integer(source, f"bytes.{name}", getattr(artifact.bytes, name), 0, MAX_BYTES)
    _check_reports(artifact, source)
    _check_samples(artifact.model.samples, source)
    for name, values in artifact.profile.items():
        _check_profile(name, values, source)
    _check_shapes(artifact.budgets, artifact.model, source)
    _check_budgets(artifact, source)
    _check_scorer(artifact, source)
    _check_quantiser(artifact, source)
    _check_rank(artifact, source)
    _check_bytes(artifact.bytes, artifact, source)


def refuse(source: str, field: str, problem: str) -> NoReturn:
    """Raise the sentence `source: field problem`."""
    raise ArtifactError(f"{source}: {field} {problem}")


def printable(text: str) -> str:
    """The text as one line, whatever a file or a file's name holds: unprintable characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show(value: object) -> str:
    """A found value, short enough for a sentence, however long or deep it is."""
    return printable(_SHORT.repr(value))


def require_integer(source: str, field: str, value: object, low: int, high: int) -> None:
    """Refuse all but a Python int in [low, high]; a bool is not an integer here."""
    if type(value) is not int or not low <= value <= high:
        refuse(source, field, f"is {show(value)}, expected an integer from {low} to {high}")


def _check_text(source: str, field: str, value: object) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or not value.isprintable():
        refuse(source, field, f"is {show(value)}, expected printable text of 1 to 4096 characters")


def _check_dtype(source: str, field: str, value: object) -> None:
    if not isinstance(value, str) or value not in DTYPE_BITS:
        refuse(source, field, f"is {show(value)}, expected one of {', '.join(DTYPE_BITS)}")


def _check_model(model: ModelIdentity, source: str) -> None:
    _check_text(source, "model.name", model.name)
    _check_text(source, "model.architecture", model.architecture)
    _check_dtype(source, "model.dtype", model.dtype)
    for name, limit in MODEL_LIMITS.items():
        require_integer(source, f"model.{name}", getattr(model, name), 1, limit)
    if model.num_attention_heads % model.num_kv_heads:
        found = f"is {model.num_kv_heads}, expected a divisor of num_attention_heads {model.num_attention_heads}"
        refuse(source, "model.num_kv_heads", found)
    if not isinstance(model.windows, tuple) or len(model.windows) != model.num_layers:
        refuse(source, "model.windows", f"is {show(model.windows)}, expected {model.num_layers} integers")
    for layer, window in enumerate(model.windows):
        require_integer(source, f"model.windows[{layer}]", window, 0, MAX_TOKENS)
    if not isinstance(model.fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", model.fingerprint):
        refuse(source, "model.fingerprint", f"is {show(model.fingerprint)}, expected 64 lower-case hex digits")


def _check_target(target: Target, source: str) -> None:
    require_integer(source, "target.bytes", target.bytes, 1, MAX_BYTES)
    require_integer(source, "target.context", target.context, 1, MAX_TOKENS)
    require_integer(source, "target.batch", target.batch, 1, 2**20)
    _check_dtype(source, "target.dtype", target.dtype)


def _check_reports(artifact: Artifact, source: str) -> None:
    loss = artifact.predicted_loss
    if not isinstance(loss, float) or np.isinf(loss):
        refuse(source, "predicted_loss", f"is {show(loss)}, expected a finite number or NaN")
    for name in ("solver", "calibration", "versions"):
        _check_json(source, name, getattr(artifact, name))
    for key, version in artifact.versions.items():
        _check_text(source, f"versions[{show(key)}]", version)


def _check_json(source: str, field: str, value: object) -> None:
    if not isinstance(value, Mapping):
        refuse(source, field, f"is {show(value)}, expected a JSON object")
    try:
        json.dumps(dict(value), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = printable(str(error))
        raise ArtifactError(f"{source}: {field} is no JSON object of finite numbers and text: {reason}") from error


def _check_array(source: str, field: str, values: object, dtypes: tuple[str, ...]) -> None:
    if not isinstance(values, np.ndarray) or values.dtype not in [DTYPES[name] for name in dtypes]:
        found = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        refuse(source, f"tensor {field}", f"has the element type {found}, expected {' or '.join(dtypes)}")


def _check_finite(source: str, field: str, values: NDArray[Any]) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        refuse(source, f"tensor {field}", f"has {values[tuple(bad[0])]} at {bad[0].tolist()}, expected finite numbers")


def _check_samples(samples: NDArray[np.float32], source: str) -> None:
    _check_array(source, "fingerprint.samples", samples, ("F32",))
    if samples.ndim != 1 or not samples.size:
        refuse(source, "tensor fingerprint.samples", f"has the shape {list(samples.shape)}, expected [N] with N >= 1")
    _check_finite(source, "fingerprint.samples", samples)


def _check_profile(name: str, values: NDArray[Any], source: str) -> None:
    _check_text(source, "the name of a profile tensor", name)
    _check_array(source, f"profile.{name}", values, tuple(DTYPES))
    _check_finite(source, f"profile.{name}", values)


def _check_shapes(budgets: Budgets, model: ModelIdentity, source: str) -> None:
    shape = (model.num_layers, model.num_kv_heads)
    for name, dtype in BUDGET_TENSORS.items():
        values = getattr(budgets, name)
        _check_array(source, name, values, (dtype,))
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
    known_bits = (*QUANTISED_BITS, DTYPE_BITS[dtype])
    for name in ("k_bits", "v_bits"):
        if row[name] not in known_bits:
            expected = ", ".join(map(str, known_bits))
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


def _check_scorer(artifact: Artifact, source: str) -> None:
    model, scorer = artifact.model, artifact.scorer
    if scorer is None:
        if (artifact.budgets.policy == POLICIES.index("scored")).any():
            refuse(source, "tensor scorer.weight", "is missing, expected it beside heads of policy scored")
        return
    shapes = {"weight": (model.num_layers, model.num_kv_heads, model.hidden_size)}
    shapes["bias"] = shapes["weight"][:2]
    _check_part(source, "scorer", scorer, SCORER_TENSORS, shapes)


def _check_quantiser(artifact: Artifact, source: str) -> None:
    model, quantiser, budgets = artifact.model, artifact.quantiser, artifact.budgets
    if quantiser is None:
        if np.isin([budgets.k_bits, budgets.v_bits], QUANTISED_BITS).any():
            refuse(source, "tensor quantiser.key_transform", "is missing, expected it beside heads of 4 or 8 bits")
        return
    if model.head_dim % (2 * groups(model.head_dim)):
        refuse(source, "model.head_dim", f"is {model.head_dim}, expected a size that splits into groups of pairs")
    mean = (model.num_layers, model.num_kv_heads, model.head_dim)
    square = (*mean, model.head_dim)
    shapes = {"key_transform": square, "key_mean": mean, "value_transform": square, "value_mean": mean}
    _check_part(source, "quantiser", quantiser, QUANTISER_TENSORS, shapes)
    for name in ("key_transform", "value_transform"):
        values = np.linalg.svd(getattr(quantiser, name).astype(np.float64), compute_uv=False)
        if (values[..., -1] * MAX_CONDITION < values[..., 0]).any() or not values[..., 0].all():
            refuse(source, f"tensor quantiser.{name}", f"is no well-conditioned matrix (beyond {MAX_CONDITION:.0e})")


def _check_part(
    source: str, part: str, values: Scorer | Quantiser, dtypes: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> None:
    for name, dtype in dtypes.items():
        array, field = getattr(values, name), f"{part}.{name}"
        _check_array(source, field, array, (dtype,))
        if array.shape != shapes[name]:
            refuse(source, f"tensor {field}", f"has the shape {list(array.shape)}, expected {list(shapes[name])}")
        _check_finite(source, field, array)


def _check_rank(artifact: Artifact, source: str) -> None:
    rank, model = artifact.rank, artifact.model
    if rank is None:
        return
    _check_array(source, "rank", rank, ("I32",))
    if rank.shape != (model.num_layers, model.num_kv_heads):
        expected = [model.num_layers, model.num_kv_heads]
        refuse(source, "tensor rank", f"has the shape {list(rank.shape)}, expected {expected}")
    if rank.min() < 0 or rank.max() >= model.num_kv_heads:
        refuse(source, "tensor rank", f"goes from {rank.min()} to {rank.max()}, expected ranks of one head or more")


def _check_bytes(account: ByteAccount, artifact: Artifact, source: str) -> None:
    model, target = artifact.model, artifact.target
    token = 2 * model.num_kv_heads * model.head_dim * DTYPE_BITS[target.dtype] // 8
    expected = {
        "resident": resident_bytes(artifact.budgets, model.head_dim, DTYPE_BITS[target.dtype]) * target.batch,
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
