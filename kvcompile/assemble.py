"""From a plan to an artifact: storage order, byte account, provenance."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    anchor_bytes,
    full_bytes,
    loaded_bytes,
    resident_bytes,
    slot_bytes,
    token_limits,
)
from kvcompile.placement import place
from kvcompile.problem import Plan, Problem, Profile
from kvcompile.quantiser import KeyMoments, Moment, Positions, Rotary, for_context, key_growth, layer_positions

RECORDED = ("kvcompile", "numpy", "scipy", "torch", "transformers")
"""Packages whose versions the artifact names."""


def pose(
    model: ModelIdentity,
    profile: Profile,
    target: Target,
    policy: str,
    sink: int,
    widths: tuple[int, ...] | None = None,
    classes: int | None = None,
) -> Problem:
    """One sequence's share of a target, as a problem for an allocator; `widths` default to the target's own alone."""
    limit = np.array(token_limits(model.windows, target.context), np.int32)
    bits = DTYPE_BITS[target.dtype]
    growth: NDArray[np.float64] | float = 1.0
    if profile.keys is not None and set(widths or ()) - {bits}:
        measured = (Positions(0, profile.window),) * model.num_layers
        growth = key_growth(profile.keys, measured, layer_positions(limit.tolist(), target.context))
    return Problem(
        profile=profile,
        limit=limit,
        fixed=limit < target.context,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype_bits=bits,
        widths=widths or (bits,),
        target=target.bytes // target.batch,
        context=target.context,
        key_growth=growth,
        policy=policy,
        sink=sink,
        classes=classes,
    )


@dataclass(frozen=True)
class Parts:
    """What goes into an artifact beside the plan: the profile, and the scorer and quantiser that it is for."""

    profile: Profile
    scorer: Scorer | None
    quantiser: Quantiser | None

    def at_context(self, model: ModelIdentity, context: int) -> Parts:
        """These parts with keys quantised for the positions of `context` tokens; as they are where the profile does not
        say what that takes, as in artifacts from before it did."""
        if self.quantiser is None or self.profile.keys is None:
            return self
        limits = token_limits(model.windows, context)
        return replace(self, quantiser=for_context(self.quantiser, self.profile.keys, limits, context))


def assemble(
    model: ModelIdentity,
    parts: Parts,
    target: Target,
    plan: Plan,
    *,
    solver: Mapping[str, Any],
    calibration: Mapping[str, Any],
    ranks: int | None = None,
) -> Artifact:
    """The artifact for a plan, placed on `ranks` tensor-parallel ranks where that is given; the same arguments give the
    same artifact, so no times are in it.

    Raises:
        TargetError: heads that do not divide among the ranks.
    """
    placement = None if ranks is None else place(head_bytes(plan, model.head_dim, DTYPE_BITS[target.dtype]), ranks)
    rank = None if placement is None else placement.rank
    budgets = Budgets(
        plan.policy, plan.capacity, plan.sink, plan.recent, plan.k_bits, plan.v_bits,
        head_order=storage_order(plan, rank),
    )  # fmt: skip
    transient = 2 * target.context * model.num_kv_heads * model.head_dim * DTYPE_BITS[target.dtype] // 8
    report = {**solver, **plan.report, **({"placement": placement.report()} if placement else {})}
    return Artifact(
        model=model,
        target=target,
        bytes=ByteAccount(
            resident=target.batch * resident_bytes(budgets, model.head_dim, DTYPE_BITS[target.dtype]),
            scorer=loaded_bytes(parts.scorer, parts.quantiser),
            transient=target.batch * transient,
            full=target.batch * full_bytes(model, target.context, target.dtype),
        ),
        budgets=budgets,
        predicted_loss=plan.loss,
        solver=report,
        calibration=calibration,
        versions={name: importlib.metadata.version(name) for name in RECORDED},
        profile=profile_arrays(parts.profile),
        scorer=parts.scorer,
        quantiser=parts.quantiser,
        rank=rank,
    )


def head_bytes(plan: Plan | Budgets, head_dim: int, dtype_bits: int) -> NDArray[np.int64]:
    """Bytes of every head's cache, [L, H], for one sequence."""
    size = np.zeros(plan.capacity.shape, np.int64)
    for at in np.ndindex(size.shape):
        k, v = int(plan.k_bits[at]), int(plan.v_bits[at])
        slots = int(plan.capacity[at]) * slot_bytes(POLICIES[plan.policy[at]], head_dim, k, v)
        size[at] = slots + anchor_bytes(int(plan.sink[at]), head_dim, k, v, dtype_bits)
    return size


def storage_order(plan: Plan, rank: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
    """Heads of a layer by rank, then policy and bits, then the largest first: equal heads are neighbours and form one
    dense batch."""
    keys: list[NDArray[Any]] = [plan.recent, plan.sink, -plan.capacity, plan.v_bits, plan.k_bits, plan.policy]
    if rank is not None:
        keys.append(rank)  # np.lexsort: the last key sorts first
    return np.stack([np.lexsort([key[i] for key in keys]) for i in range(len(plan.policy))]).astype(np.int32)


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
    if profile.keys is not None:
        arrays |= key_arrays(profile.keys)
    return arrays


TABLES = ("tokens", "shares", "loss", "bits", "key_loss", "value_loss", "baklava", "squeeze", "surfacelogic")
"""Fields of a profile that are stored as they are."""


def stored_parts(artifact: Artifact) -> Parts:
    """The parts inside an artifact, to solve other targets from. Raises ArtifactError as `stored_profile` does."""
    return Parts(stored_profile(artifact), artifact.scorer, artifact.quantiser)


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
            "bits": np.zeros(0, np.int32),
            "key_loss": np.zeros((1, *heads, 0), np.float32),
            "value_loss": np.zeros((1, *heads, 0), np.float32),
            "factor": np.ones(1, np.float32),
        }
    axes = {name: arrays[name] for name in ("tokens", "shares", "bits") if name in arrays}
    sizes = {name: len(axis) for name, axis in axes.items() if axis.ndim == 1}
    names = bytes(arrays.get("families", NONE)).decode(errors="replace").split("\n")
    points, shares, widths = (sizes.get(name, -1) for name in ("tokens", "shares", "bits"))
    shapes = {
        "window": (1,), "tokens": (points,), "shares": (shares,), "loss": (len(names), *heads, shares, points),
        "bits": (widths,), "key_loss": (len(names), *heads, widths), "value_loss": (len(names), *heads, widths),
        "factor": (1,), "baklava": heads, "squeeze": heads[:1], "surfacelogic": heads,
    }  # fmt: skip
    for name, shape in shapes.items():
        if points < 1 or name not in arrays or arrays[name].shape != shape:
            raise ArtifactError(f"the artifact carries no usable profile.{name}: expected an array of shape {shape}")
    tokens, window = arrays["tokens"], int(arrays["window"][0])
    if (np.diff(tokens) <= 0).any() or tokens[-1] != window or tokens[0] < 1 or not arrays["factor"][0] > 0:
        raise ArtifactError("the artifact carries no usable profile.tokens: expected budgets that rise to the window")
    return Profile(
        families=tuple(names),
        window=window,
        factor=float(arrays["factor"][0]),
        correlation=float(arrays["correlation"][0]) if arrays.get("correlation", NONE).size else math.nan,
        keys=stored_keys(arrays, (*heads, model.head_dim)) if "rotary_frequency" in arrays else None,
        **{name: arrays[name] for name in TABLES},
    )


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
