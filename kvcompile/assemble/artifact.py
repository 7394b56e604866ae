"""From a plan to an artifact: storage order, byte account, provenance."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import (
    DTYPE_BITS,
    Artifact,
    Budgets,
    ByteAccount,
    ModelIdentity,
    Target,
    full_bytes,
    head_bytes,
    loaded_bytes,
    resident_bytes,
    state_bytes,
    token_limits,
)
from kvcompile.assemble.placement import place
from kvcompile.assemble.tables import profile_arrays
from kvcompile.quantiser import for_context, laid_out
from kvcompile.stages import Parts, Plan

RECORDED = ("kvcompile", "numpy", "scipy", "torch", "transformers")
"""Packages whose versions the artifact names."""


def at_context(parts: Parts, model: ModelIdentity, context: int) -> Parts:
    """The parts with keys quantised for the positions of `context` tokens; as they are where the profile does not say
    what that takes, as in artifacts from before it did."""
    if parts.quantiser is None or parts.profile.keys is None:
        return parts
    limits = token_limits(model.windows, context)
    return replace(parts, quantiser=for_context(parts.quantiser, parts.profile.keys, limits, context))


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
    """The artifact for a plan, its quantiser made for the positions of the target's context and laid out for the codecs
    of the plan, placed on `ranks` tensor-parallel ranks where that is given; the same arguments give the same artifact,
    so no times are in it.

    Raises:
        TargetError: heads that do not divide among the ranks.
    """
    parts = at_context(parts, model, target.context)
    placement = None if ranks is None else place(head_bytes(plan, model.head_dim, DTYPE_BITS[target.dtype]), ranks)
    rank = None if placement is None else placement.rank
    budgets = Budgets(
        plan.policy, plan.capacity, plan.sink, plan.recent, plan.k_bits, plan.v_bits,
        head_order=storage_order(plan, rank),
    )  # fmt: skip
    quantiser = None if parts.quantiser is None else laid_out(parts.quantiser, plan.k_bits, plan.v_bits)
    held = resident_bytes(budgets, model.head_dim, DTYPE_BITS[target.dtype])
    transient = 2 * target.context * model.num_kv_heads * model.head_dim * DTYPE_BITS[target.dtype] // 8
    report = {**solver, **plan.report, **({"placement": placement.report()} if placement else {})}
    return Artifact(
        model=model,
        target=target,
        bytes=ByteAccount(
            resident=target.batch * (held + state_bytes(model, target.dtype)),
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
        quantiser=quantiser,
        rank=rank,
    )


def storage_order(plan: Plan, rank: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
    """Heads of a layer by rank, then policy and bits, then the largest first: equal heads are neighbours and form one
    dense batch."""
    keys: list[NDArray[Any]] = [plan.recent, plan.sink, -plan.capacity, plan.v_bits, plan.k_bits, plan.policy]
    if rank is not None:
        keys.append(rank)  # np.lexsort: the last key sorts first
    return np.stack([np.lexsort([key[i] for key in keys]) for i in range(len(plan.policy))]).astype(np.int32)
