"""The profile as the artifact's arrays, and back: FORMAT.md's section on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import Artifact, ArtifactError
from kvcompile.quantiser import balanced_again
from kvcompile.stages import KeptLosses, KeyMoments, Moment, Parts, Profile, Rotary


def profile_arrays(profile: Profile) -> dict[str, NDArray[Any]]:
    """The profile as the artifact stores it."""
    names = "\n".join(profile.families).encode()
    arrays = {
        "families": np.frombuffer(names, np.uint8),
        "window": np.array([profile.window], np.int32),
        **{name: getattr(profile, name) for name in TABLES},
        "factor": np.array([profile.factor], np.float32),
    }
    if np.isfinite(profile.correlation):
        arrays["correlation"] = np.array([profile.correlation], np.float32)
    if len(profile.checks):
        arrays["checks"] = profile.checks
    if profile.keys is not None:
        arrays |= key_arrays(profile.keys)
    if (kept := profile.kept) is not None:
        arrays |= {"kept_tokens": kept.tokens, "kept_key_loss": kept.key, "kept_value_loss": kept.value}
    return arrays


TABLES = (
    "tokens", "shares", "loss", "key_bits", "value_bits", "key_loss", "value_loss", "baklava", "squeeze",
    "surfacelogic",
)  # fmt: skip
"""Fields of a profile that are stored as they are."""


def stored_parts(artifact: Artifact) -> Parts:
    """The parts inside an artifact, to solve other targets from. Raises ArtifactError as `stored_profile` does."""
    quantiser, budgets = artifact.quantiser, artifact.budgets
    if quantiser is not None:
        quantiser = balanced_again(quantiser, budgets.k_bits, budgets.v_bits)
    return Parts(stored_profile(artifact), artifact.scorer, quantiser)


def stored_profile(artifact: Artifact) -> Profile:
    """The profile inside an artifact, from which another target can be solved. A version 1 file has one family, whose
    curves are of the policy `recent` alone.

    Raises:
        ArtifactError: an artifact that was written without one, or whose arrays do not fit its model.
    """
    arrays, model = dict(artifact.profile), artifact.model
    heads = (model.num_layers, model.num_kv_heads)
    if "recent_loss" in arrays and "loss" not in arrays:
        arrays |= {
            "families": np.frombuffer(b"text", np.uint8),
            "shares": np.ones(1, np.float32),
            "loss": np.asarray(arrays["recent_loss"])[None, ..., None, :],
            "key_bits": np.zeros(0, np.int32),
            "value_bits": np.zeros(0, np.int32),
            "key_loss": np.zeros((1, *heads, 0), np.float32),
            "value_loss": np.zeros((1, *heads, 0), np.float32),
            "factor": np.ones(1, np.float32),
        }
    if "bits" in arrays:  # files from before keys and values were measured in codecs of their own
        arrays = {"key_bits": arrays["bits"], "value_bits": arrays["bits"]} | arrays
    axes = {name: arrays[name] for name in ("tokens", "shares", "key_bits", "value_bits") if name in arrays}
    sizes = {name: len(axis) for name, axis in axes.items() if axis.ndim == 1}
    names = bytes(arrays.get("families", NONE)).decode(errors="replace").split("\n")
    points, shares, keys, values = (sizes.get(name, -1) for name in ("tokens", "shares", "key_bits", "value_bits"))
    shapes = {
        "window": (1,), "tokens": (points,), "shares": (shares,), "loss": (len(names), *heads, shares, points),
        "key_bits": (keys,), "value_bits": (values,), "key_loss": (len(names), *heads, keys),
        "value_loss": (len(names), *heads, values),
        "factor": (1,), "baklava": heads, "squeeze": heads[:1], "surfacelogic": heads,
    }  # fmt: skip
    for name, shape in shapes.items():
        if points < 1 or name not in arrays or arrays[name].shape != shape:
            raise ArtifactError(f"the artifact carries no usable profile.{name}: expected an array of shape {shape}")
    tokens, window = arrays["tokens"], int(arrays["window"][0])
    if (np.diff(tokens) <= 0).any() or tokens[-1] != window or tokens[0] < 1 or not arrays["factor"][0] > 0:
        raise ArtifactError("the artifact carries no usable profile.tokens: expected budgets that rise to the window")
    for name in ("loss", "key_loss", "value_loss", "kept_key_loss", "kept_value_loss"):
        if (arrays.get(name, NONE) < 0).any():
            raise ArtifactError(f"the artifact carries no usable profile.{name}: expected losses of 0 or more")
    correlation = arrays.get("correlation", NONE)
    if correlation.shape not in ((0,), (1,)):
        raise ArtifactError("the artifact carries no usable profile.correlation: expected an array of shape (1,)")
    checks = arrays.get("checks", np.zeros((0, 2), np.float32))
    if checks.ndim != 2 or checks.shape[1] != 2:
        raise ArtifactError("the artifact carries no usable profile.checks: expected an array of shape (N, 2)")
    return Profile(
        families=tuple(names),
        window=window,
        factor=float(arrays["factor"][0]),
        correlation=float(correlation[0]) if correlation.size else math.nan,
        checks=checks,
        keys=stored_keys(arrays, (*heads, model.head_dim)) if "rotary_frequency" in arrays else None,
        kept=_stored_kept(arrays, (len(names), *heads), (keys, values), window) if "kept_tokens" in arrays else None,
        **{name: arrays[name] for name in TABLES},
    )


def _stored_kept(
    arrays: Mapping[str, NDArray[Any]], heads: tuple[int, int, int], codecs: tuple[int, int], window: int
) -> KeptLosses:
    """Losses of codecs among kept tokens inside an artifact; `heads` is [F, L, H] and `codecs` (Qk, Qv). Raises
    ArtifactError for arrays that do not fit."""
    tokens, known = arrays["kept_tokens"], ("kept_key_loss", "kept_value_loss")
    if tokens.ndim != 1 or not len(tokens) or (np.diff(tokens, append=window) <= 0).any() or tokens[0] < 1:
        raise ArtifactError("the artifact carries no usable profile.kept_tokens: expected budgets below the window")
    for name, count in zip(known, codecs, strict=True):
        shape = (*heads, len(tokens), count)
        if name not in arrays or arrays[name].shape != shape:
            raise ArtifactError(f"the artifact carries no usable profile.{name}: expected an array of shape {shape}")
    return KeptLosses(tokens, *(arrays[name] for name in known))


def key_arrays(keys: KeyMoments) -> dict[str, NDArray[Any]]:
    """Moments of keys as the artifact stores them."""
    return {
        "key_mean": keys.plain.mean, "key_factor": keys.plain.factor,
        "attended_mean": keys.attended.mean, "attended_factor": keys.attended.factor,
        "query_factor": keys.query.factor,
        "rotary_frequency": keys.rotary.frequency, "rotary_partner": keys.rotary.partner,
        "rotary_context": np.array([keys.rotary.context], np.int32),
    }  # fmt: skip


def stored_keys(arrays: Mapping[str, NDArray[Any]], shape: tuple[int, int, int]) -> KeyMoments:
    """The moments of keys inside an artifact; `shape` is [L, H, D].

    Raises:
        ArtifactError: arrays that are missing, or do not fit the model.
    """
    size = shape[-1]
    factor = (*shape[:2], size * (size + 1) // 2)
    shapes = {
        "key_mean": shape, "key_factor": factor, "attended_mean": shape, "attended_factor": factor,
        "query_factor": factor, "rotary_frequency": (shape[0], size), "rotary_partner": (size,), "rotary_context": (1,),
    }  # fmt: skip
    for name, expected in shapes.items():
        if name not in arrays or arrays[name].shape != expected:
            raise ArtifactError(f"the artifact carries no usable profile.{name}: expected an array of shape {expected}")
    partner, context = arrays["rotary_partner"], int(arrays["rotary_context"][0])
    paired = partner.dtype == np.int32 and ((partner >= 0) & (partner < size)).all()
    if not paired or (partner[partner] != np.arange(size)).any():
        raise ArtifactError("the artifact carries no usable profile.rotary_partner: expected pairs of components")
    if context < 0:
        raise ArtifactError("the artifact carries no usable profile.rotary_context: expected 0 or more tokens")
    query = Moment(np.zeros(shape, np.float32), arrays["query_factor"])
    rotary = Rotary(arrays["rotary_frequency"], partner, context)
    plain, attended = (Moment(arrays[f"{kind}_mean"], arrays[f"{kind}_factor"]) for kind in ("key", "attended"))
    return KeyMoments(plain, attended, query, rotary)


NONE: NDArray[Any] = np.zeros(0, np.uint8)
"""Stands for an array that is not there."""
