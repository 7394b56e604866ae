"""Which model an artifact is for: its shape, and a fingerprint that reads a few numbers of every weight."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts.errors import ModelError
from kvcompile.artifacts.schema import DTYPE_BITS, ModelIdentity

SAMPLES = 16
"""Numbers read of every tensor."""

ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of rounding to an element type."""

SMALLEST_STEP = 2.0**-24
"""The distance of float16's subnormal numbers: below it, a weight may vanish in float16."""

SHAPE = ("architecture", "num_layers", "num_attention_heads", "num_kv_heads", "head_dim", "hidden_size", "windows")


def identify(model: Any, name: str) -> ModelIdentity:
    """The identity of a transformers causal LM that was loaded by `name`.

    The fingerprint is 64 hex digits: the first 32 of a sha256 over the names and shapes of the state dict, then the
    first 32 of a sha256 over the samples, so that equal structure is still seen when weights were rounded.
    Raises ModelError for a model without the usual shape, and for weights that are on the meta device, packed or not
    finite.
    """
    config = model.config.get_text_config()
    try:
        heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
        layers, windows = int(config.num_hidden_layers), _windows(config)
    except AttributeError as error:
        raise ModelError(f"{name} is a {config.model_type} model, expected a decoder of attention layers") from error
    dtype = _dtype_name(model)
    if dtype not in DTYPE_BITS:
        raise ModelError(f"{name} has weights of type {dtype}, expected one of {', '.join(DTYPE_BITS)}")
    fingerprint, samples = _fingerprint(model, name)
    return ModelIdentity(
        name=name,
        architecture=str(config.model_type),
        num_layers=layers,
        num_attention_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
        hidden_size=hidden,
        windows=windows,
        dtype=dtype,
        fingerprint=fingerprint,
        samples=samples,
    )


def check_identity(expected: ModelIdentity, found: ModelIdentity) -> None:
    """Check that the model `found` is the one an artifact was compiled for; names do not matter.

    The same weights in another element type are accepted: their samples may differ by the rounding to both types.
    Raises ModelError, one sentence that names the first difference.
    """
    remedy = f"load {expected.name} or build an artifact for {found.name}"
    for field in SHAPE:
        was, now = getattr(expected, field), getattr(found, field)
        if was != now:
            raise ModelError(f"the model has {field} {now}, but the artifact is for one with {field} {was}: {remedy}")
    if expected.fingerprint[:32] != found.fingerprint[:32]:
        raise ModelError(f"the model's tensors differ in name or shape from those the artifact is for: {remedy}")
    rounded = expected.dtype != found.dtype
    if not (_agree(expected, found) if rounded else expected.fingerprint == found.fingerprint):
        raise ModelError(f"the model's weights are not those the artifact is for: {remedy}")


def _agree(expected: ModelIdentity, found: ModelIdentity) -> bool:
    was, now = expected.samples.astype(np.float64), found.samples.astype(np.float64)
    if was.shape != now.shape:
        return False
    relative = ROUNDING[expected.dtype] + ROUNDING[found.dtype]
    allowed = relative * np.maximum(np.abs(was), np.abs(now)) + SMALLEST_STEP
    return bool(np.all(np.abs(was - now) <= allowed))


def _windows(config: Any) -> tuple[int, ...]:
    """Each layer's sliding window, 0 for full attention, read from the config as transformers' own caches read it."""
    widths = {"full_attention": 0, "sliding_attention": int(getattr(config, "sliding_window", None) or 0)}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention"] * config.num_hidden_layers
    for kind in kinds:
        if kind not in widths:
            raise ModelError(f"the model has a layer of type {kind}, expected full_attention or sliding_attention")
    return tuple(widths[kind] for kind in kinds)


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fingerprint(model: Any, name: str) -> tuple[str, NDArray[np.float32]]:
    """Fingerprint and samples: of every tensor of the state dict, in the order of their names, up to 16 elements,
    evenly spread from the first to the last, as f32."""
    structure, samples = hashlib.sha256(), []
    for key, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise ModelError(f"{name} has no numbers in {key} (meta device), expected loaded weights")
        if _dtype_name(tensor) not in DTYPE_BITS:
            raise ModelError(f"{name} has {key} of type {_dtype_name(tensor)}, expected weights that are not packed")
        structure.update(f"{key} {list(tensor.shape)}\n".encode())
        count = tensor.numel()
        taken = min(count, SAMPLES)
        places = [i * (count - 1) // max(taken - 1, 1) for i in range(taken)]
        # Indexed before it is converted: a whole tensor of a large model is never copied.
        values = tensor.reshape(-1)[places].float().cpu().numpy()
        if not np.isfinite(values).all():
            raise ModelError(f"{name} has NaN or infinity in {key}, expected finite weights")
        samples.append(values)
    flat = np.concatenate([np.zeros(0, np.float32), *samples])
    numbers = hashlib.sha256(flat.astype("<f4").tobytes())
    return structure.hexdigest()[:32] + numbers.hexdigest()[:32], flat
