"""An artifact's account, for people and programs."""

from __future__ import annotations

from typing import Any

from kvcompile.artifacts import POLICIES, Artifact, prefill_bytes


def summary(artifact: Artifact) -> dict[str, Any]:
    """An artifact's account as a JSON object."""
    budgets, target = artifact.budgets, artifact.target
    loss = artifact.predicted_loss
    return {
        "model": artifact.model.name,
        "architecture": artifact.model.architecture,
        "target_bytes": target.bytes,
        "context": target.context,
        "batch": target.batch,
        "dtype": target.dtype,
        "resident_bytes": artifact.bytes.resident,
        "transient_bytes": artifact.bytes.transient,
        "prefill_bytes": prefill_bytes(artifact, target.batch, target.context),
        "scorer_bytes": artifact.bytes.scorer,
        "full_bytes": artifact.bytes.full,
        "share_of_full": artifact.bytes.resident / artifact.bytes.full,
        "quantised_positions": quantised_positions(artifact),
        "policies": {name: int((budgets.policy == i).sum()) for i, name in enumerate(POLICIES)},
        "predicted_loss": None if loss != loss else loss,
        "solver": dict(artifact.solver),
        "calibration": dict(artifact.calibration),
        "versions": dict(artifact.versions),
    }


def quantised_positions(artifact: Artifact) -> int | None:
    """The number of positions, from 0 on, that the transforms of keys are made for: the context's, or the profile's
    window in files from before a profile had moments of keys; None without a quantiser, or where the file is silent."""
    if artifact.quantiser is None:
        return None
    if "rotary_frequency" in artifact.profile:
        return artifact.target.context
    window = artifact.profile.get("window")
    return None if window is None else int(window[0])
