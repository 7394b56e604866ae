"""From a plan to an artifact: storage order, byte account, provenance."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
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
    Target,
    full_bytes,
    resident_bytes,
    slot_bytes,
    token_limits,
)
from kvcompile.problem import Plan, Problem, Profile

RECORDED = ("kvcompile", "numpy", "scipy", "torch", "transformers")
"""Packages whose versions the artifact names."""


def pose(model: ModelIdentity, profile: Profile, target: Target, policy: str, sink: int) -> Problem:
    """One sequence's share of a target, as a problem for an allocator."""
    limit = np.array(token_limits(model.windows, target.context), np.int32)
    bits = DTYPE_BITS[target.dtype]
    return Problem(
        profile=profile,
        limit=limit,
        fixed=limit < target.context,
        num_kv_heads=model.num_kv_heads,
        slot_bytes={name: slot_bytes(name, model.head_dim, bits, bits) for name in POLICIES},
        target=target.bytes // target.batch,
        context=target.context,
        policy=policy,
        sink=sink,
    )


def assemble(
    model: ModelIdentity,
    profile: Profile,
    target: Target,
    plan: Plan,
    *,
    solver: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> Artifact:
    """The artifact for a plan; the same arguments give the same artifact, so no times are in it."""
    bits = np.full(plan.capacity.shape, DTYPE_BITS[target.dtype], np.uint8)
    budgets = Budgets(
        plan.policy, plan.capacity, plan.sink, plan.recent, k_bits=bits, v_bits=bits, head_order=storage_order(plan)
    )
    transient = 2 * target.context * model.num_kv_heads * model.head_dim * DTYPE_BITS[target.dtype] // 8
    return Artifact(
        model=model,
        target=target,
        bytes=ByteAccount(
            resident=target.batch * resident_bytes(budgets, model.head_dim),
            scorer=0,
            transient=target.batch * transient,
            full=target.batch * full_bytes(model, target.context, target.dtype),
        ),
        budgets=budgets,
        predicted_loss=plan.loss,
        solver={**solver, **plan.report},
        calibration=calibration,
        versions={name: importlib.metadata.version(name) for name in RECORDED},
        profile=profile_arrays(profile),
    )


def storage_order(plan: Plan) -> NDArray[np.int32]:
    """Heads of a layer by policy, then the largest first: equal heads are neighbours and form one dense batch."""
    keys = (plan.recent, plan.sink, -plan.capacity, plan.policy)  # np.lexsort: the last key sorts first
    return np.stack([np.lexsort([key[i] for key in keys]) for i in range(len(plan.policy))]).astype(np.int32)


def profile_arrays(profile: Profile) -> dict[str, NDArray[Any]]:
    """The profile as the artifact stores it."""
    return {
        "window": np.array([profile.window], np.int32),
        "tokens": profile.tokens,
        "recent_loss": profile.recent_loss,
        "baklava": profile.baklava,
        "squeeze": profile.squeeze,
        "surfacelogic": profile.surfacelogic,
    }


def stored_profile(artifact: Artifact) -> Profile:
    """The profile inside an artifact, from which another target can be solved.

    Raises:
        ArtifactError: an artifact that was written without one, or whose arrays do not fit its model.
    """
    arrays, model = artifact.profile, artifact.model
    heads = (model.num_layers, model.num_kv_heads)
    points = len(arrays.get("tokens", ()))
    shapes = {
        "window": (1,), "tokens": (points,), "recent_loss": (*heads, points), "baklava": heads,
        "squeeze": heads[:1], "surfacelogic": heads,
    }  # fmt: skip
    for name, shape in shapes.items():
        if points == 0 or name not in arrays or arrays[name].shape != shape:
            raise ArtifactError(f"the artifact carries no usable profile.{name}: expected an array of shape {shape}")
    return Profile(window=int(arrays["window"][0]), **{name: arrays[name] for name in shapes if name != "window"})
