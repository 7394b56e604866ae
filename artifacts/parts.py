"""The parts that only some artifacts have: the scorer, the quantiser and the ranks of heads."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts.checks import refuse, require_array, require_finite
from kvcompile.artifacts.schema import POLICIES, Artifact, ModelIdentity, Quantiser, Scorer
from kvcompile.kernels.codecs import CODECS

SCORER_TENSORS = {"weight": "F16", "bias": "F32"}
"""The fields of `Scorer`, in the file after `scorer.`."""

QUANTISER_TENSORS = {"key_transform": "F16", "key_mean": "F16", "value_transform": "F16", "value_mean": "F16"}
"""The fields of `Quantiser`, in the file after `quantiser.`."""

PARTS = {"scorer": SCORER_TENSORS, "quantiser": QUANTISER_TENSORS}

MAX_HEAD_DIM = 512
"""Most elements of a key or value beside a quantiser: checking its matrices takes time with the cube of it."""

MAX_CONDITION = 1e4
"""Largest ratio of a transform's singular values: beyond it half precision does not hold its inverse."""

_AT_ONCE = 2**20
"""Elements of transforms that are checked at once: they are copied to float64."""


def check_parts(artifact: Artifact, source: str) -> None:
    """Check that the artifact has the parts that its heads need, and their shapes and numbers."""
    _check_scorer(artifact, source)
    _check_quantiser(artifact, source)
    if artifact.rank is not None:
        _check_rank(artifact.rank, artifact.model, source)


def _check_scorer(artifact: Artifact, source: str) -> None:
    model, scorer = artifact.model, artifact.scorer
    if scorer is None:
        if (artifact.budgets.policy == POLICIES.index("scored")).any():
            refuse(source, "tensor scorer.weight", "is missing, expected a version 2 file with it for scored heads")
        return
    heads = (model.num_layers, model.num_kv_heads)
    _check_part(source, "scorer", scorer, {"weight": (*heads, model.hidden_size), "bias": heads})


def _check_quantiser(artifact: Artifact, source: str) -> None:
    model, quantiser, budgets = artifact.model, artifact.quantiser, artifact.budgets
    used = [codec for id, codec in sorted(CODECS.items()) if np.isin([budgets.k_bits, budgets.v_bits], id).any()]
    if quantiser is not None and model.head_dim > MAX_HEAD_DIM:
        refuse(source, "model.head_dim", f"is {model.head_dim}, expected at most {MAX_HEAD_DIM} beside a quantiser")
    for codec in used:
        if codec.needs_transform and quantiser is None:
            missing = f"is missing, expected a version {codec.format_version} file with it for {codec.name} heads"
            refuse(source, "tensor quantiser.key_transform", missing)
        if not codec.fits(model.head_dim):
            problem = f"is {model.head_dim}, expected a multiple of {codec.step(model.head_dim)} for {codec.name} heads"
            refuse(source, "model.head_dim", problem)
    if quantiser is None:
        return
    mean = (model.num_layers, model.num_kv_heads, model.head_dim)
    square = (*mean, model.head_dim)
    shapes = {"key_transform": square, "key_mean": mean, "value_transform": square, "value_mean": mean}
    _check_part(source, "quantiser", quantiser, shapes)
    for name in ("key_transform", "value_transform"):
        _check_invertible(source, f"quantiser.{name}", getattr(quantiser, name))


def _check_part(source: str, part: str, values: Scorer | Quantiser, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, dtype in PARTS[part].items():
        array, field = getattr(values, name), f"{part}.{name}"
        require_array(source, field, array, (dtype,))
        if array.shape != shapes[name]:
            refuse(source, f"tensor {field}", f"has the shape {list(array.shape)}, expected {list(shapes[name])}")
        require_finite(source, field, array)


def _check_invertible(source: str, field: str, transform: NDArray[Any]) -> None:
    """Refuse a singular matrix, and one whose inverse magnifies some rounding errors far more than others."""
    matrices = transform.reshape(-1, *transform.shape[-2:])
    step = max(_AT_ONCE // matrices[0].size, 1)
    for first in range(0, len(matrices), step):
        sizes = np.linalg.svd(matrices[first : first + step].astype(np.float64), compute_uv=False)
        good = (sizes[:, -1] > 0) & (sizes[:, -1] * MAX_CONDITION >= sizes[:, 0])
        if not good.all():
            bad = int(np.argmin(good))
            layer, head = divmod(first + bad, transform.shape[1])
            found = f"has singular values from {sizes[bad, -1]:.3g} to {sizes[bad, 0]:.3g} at [{layer}, {head}]"
            refuse(
                source, f"tensor {field}", f"{found}, expected an invertible matrix, a ratio up to {MAX_CONDITION:.0f}"
            )


def _check_rank(rank: NDArray[np.int32], model: ModelIdentity, source: str) -> None:
    require_array(source, "rank", rank, ("I32",))
    shape = (model.num_layers, model.num_kv_heads)
    if rank.shape != shape:
        expected = f"expected [num_layers, num_kv_heads] = {list(shape)}"
        refuse(source, "tensor rank", f"has the shape {list(rank.shape)}, {expected}")
    good = (rank >= 0) & (rank < model.num_kv_heads)
    if not good.all():
        layer, head = divmod(int(np.argmin(good)), model.num_kv_heads)
        found = f"is {rank[layer, head]}, expected 0 to {model.num_kv_heads - 1}"
        refuse(source, f"rank[{layer}, {head}]", found)
