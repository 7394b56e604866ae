"""Which model an artifact is for: its shape, and a fingerprint that reads a few numbers of every weight."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts.errors import ModelError
from kvcompile.artifacts.schema import DTYPE_BITS, ModelIdentity
from kvcompile.artifacts.shapes import SHAPE, shape_of

SAMPLES = 16
"""Numbers read of every tensor."""

ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of rounding to an element type."""

SMALLEST_STEP = 2.0**-24
"""The distance of float16's subnormal numbers: below it, a weight may vanish in float16."""

Sampler = Callable[[str, list[int]], NDArray[np.float32]]
"""Gives some elements of a tensor of the state dict, by its name and their places in its flat order, as f32."""


def identify(model: Any, name: str, sampler: Sampler | None = None) -> ModelIdentity:
    """The identity of a transformers causal LM that was loaded by `name`. `sampler` looks into tensors that are on the
    meta device.

    The fingerprint is 64 hex digits: the first 32 of a sha256 over the names and shapes of the state dict, then the
    first 32 of a sha256 over the samples, so that equal structure is still seen when weights were rounded.
    Raises ModelError for a model without the usual shape, and for weights that are packed, not finite, or on the meta
    device without a sampler.
    """
    shape = shape_of(model.config, name)
    dtype = _dtype_name(model)
    if dtype not in DTYPE_BITS:
        raise ModelError(f"{name} has weights of type {dtype}, expected one of {', '.join(DTYPE_BITS)}")
    fingerprint, samples = _fingerprint(model, name, sampler)
    return ModelIdentity(name=name, **shape, dtype=dtype, fingerprint=fingerprint, samples=samples)


def check_identity(expected: ModelIdentity, found: ModelIdentity) -> None:
    """Check that the model `found` is the one an artifact was compiled for; names do not matter.

    The same weights in another element type are accepted: their samples may differ by the rounding to both types.
    Raises ModelError, one sentence that names the first difference.
    """
    check_shape(expected, {field: getattr(found, field) for field in SHAPE}, found.name)
    check_structure(expected, found.fingerprint[:32], found.name)
    rounded = expected.dtype != found.dtype
    samples, dtypes = (expected.samples, found.samples), (expected.dtype, found.dtype)
    if not (same_numbers(*samples, *dtypes) if rounded else expected.fingerprint == found.fingerprint):
        raise ModelError(f"the model's weights are not those the artifact is for: {remedy(expected, found.name)}")


def check_shape(expected: ModelIdentity, found: Mapping[str, Any], name: str) -> None:
    """Check what `shape_of` says of the model `name`. Raises ModelError, which names the first difference."""
    for field, now in found.items():
        was = getattr(expected, field)
        if was != now:
            raise ModelError(
                f"the model has {field} {now}, but the artifact is for one with {field} {was}: {remedy(expected, name)}"
            )


def check_structure(expected: ModelIdentity, found: str, name: str) -> None:
    """Check what `structure_of` says of the model `name`. Raises ModelError."""
    if expected.fingerprint[:32] != found:
        raise ModelError(
            "the model's tensors differ in name or shape from those the artifact is for: " + remedy(expected, name)
        )


def remedy(expected: ModelIdentity, name: str) -> str:
    """What to do where the model `name` is not the one that an artifact is for: the end of a sentence."""
    return f"load {expected.name} or build an artifact for {name}"


def same_numbers(was: NDArray[np.float32], now: NDArray[np.float32], was_dtype: str, now_dtype: str) -> bool:
    """Whether samples of two element types are the same numbers: equal in one type, within both roundings in two."""
    if was.shape != now.shape or was_dtype == now_dtype:
        return np.array_equal(was, now)
    was_exact, now_exact = was.astype(np.float64), now.astype(np.float64)
    relative = ROUNDING[was_dtype] + ROUNDING[now_dtype]
    allowed = relative * np.maximum(np.abs(was_exact), np.abs(now_exact)) + SMALLEST_STEP
    return bool(np.all(np.abs(was_exact - now_exact) <= allowed))


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fingerprint(model: Any, name: str, sampler: Sampler | None) -> tuple[str, NDArray[np.float32]]:
    """Fingerprint and samples: of every tensor of the state dict, in the order of their names, up to 16 elements,
    evenly spread from the first to the last, as f32."""
    # Parameters as they are: a detached part of one on a rank of tensor parallelism cannot be had in inference mode.
    tensors, samples = sorted(model.state_dict(keep_vars=True).items()), []
    for key, tensor in tensors:
        if tensor.is_meta and sampler is None:
            raise ModelError(
                f"{name} has no numbers in {key} (meta device): expected loaded weights, none of them offloaded by a "
                "device_map"
            )
        if _dtype_name(tensor) not in DTYPE_BITS:
            raise ModelError(f"{name} has {key} of type {_dtype_name(tensor)}, expected weights that are not packed")
        places = sample_places(tensor.numel())
        if tensor.is_meta and sampler is not None:
            values = sampler(key, places)
        else:
            if hasattr(tensor, "full_tensor"):  # in parts on several ranks, all of which have come here
                tensor = tensor.full_tensor()
            # Indexed before it is converted: a whole tensor of a large model is never copied.
            values = tensor.detach().reshape(-1)[places].float().cpu().numpy()
        if not np.isfinite(values).all():
            raise ModelError(f"{name} has NaN or infinity in {key}, expected finite weights")
        samples.append(values)
    flat = np.concatenate([np.zeros(0, np.float32), *samples])
    numbers = hashlib.sha256(flat.astype("<f4").tobytes())
    structure = structure_of((key, tensor.shape) for key, tensor in tensors)
    return structure + numbers.hexdigest()[:32], flat


def structure_of(tensors: Iterable[tuple[str, Sequence[int]]]) -> str:
    """The first half of a fingerprint, 32 hex digits, of the names and shapes of a state dict in the order of names."""
    lines = (f"{key} {list(shape)}\n".encode() for key, shape in tensors)
    return hashlib.sha256(b"".join(lines)).hexdigest()[:32]


def sample_places(count: int) -> list[int]:
    """The elements that are read of a tensor of `count`, by their places in its flat order: the first, the last, and
    evenly spread ones between, up to `SAMPLES`."""
    taken = min(count, SAMPLES)
    return [i * (count - 1) // max(taken - 1, 1) for i in range(taken)]
