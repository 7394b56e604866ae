"""What the page shows, as one JSON object."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvcompile.allocators.predicted import evicted, grid, quantised
from kvcompile.artifacts import DTYPE_BITS, POLICIES, Artifact, ArtifactError, TargetError, head_bytes, token_limits
from kvcompile.assemble import stored_parts
from kvcompile.compiler import resolve
from kvcompile.kernels.codecs import CODECS
from kvcompile.problem import Options, pose_with
from kvcompile.report.summary import summary
from kvcompile.stages import Parts, Plan, Problem

SHARES = (0.03, 0.05, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
"""Targets of the front, as shares of the full cache."""


def report_data(artifact: Artifact) -> dict[str, Any]:
    """Everything the page needs; `curves` and `front` are null for an artifact without a profile. `codecs` are those
    whose id in `k_bits` and `v_bits` is not their bits."""
    budgets, model = artifact.budgets, artifact.model
    plan = Plan(
        budgets.policy, budgets.capacity, budgets.sink, budgets.recent, budgets.k_bits, budgets.v_bits,
        loss=artifact.predicted_loss,
    )  # fmt: skip
    limits = token_limits(model.windows, artifact.target.context)
    size = head_bytes(plan, model.head_dim, DTYPE_BITS[artifact.target.dtype])
    data: dict[str, Any] = {
        "summary": summary(artifact),
        "shape": [model.num_layers, model.num_attention_heads, model.num_kv_heads, model.head_dim],
        "policies": list(POLICIES),
        "limits": list(limits),
        "rank": None if artifact.rank is None else artifact.rank.tolist(),
        "size": size.tolist(),
        **{
            name: getattr(budgets, name).tolist()
            for name in ("policy", "capacity", "sink", "recent", "k_bits", "v_bits", "head_order")
        },
        "codecs": {str(c.id): {"name": c.name, "bits": c.bits} for c in CODECS.values() if c.id != c.bits},
        "curves": None,
        "front": None,
    }
    try:
        parts = stored_parts(artifact)
    except ArtifactError:
        return data
    options = Options(artifact.target.context, artifact.target.batch)
    problem = pose_with(model, parts, artifact.target, options)
    return {**data, "curves": _curves(problem), "front": _front(artifact, parts)}


def _curves(problem: Problem) -> dict[str, Any]:
    """Losses of every family and head over tokens, by share of recent tokens; of K and V by bits."""
    tokens = np.unique(np.clip(np.rint(grid(problem)), 1, problem.context)).astype(np.int64)
    whole = np.array([problem.context])
    return {
        "families": list(problem.profile.families),
        "tokens": tokens.tolist(),
        "shares": [round(float(share), 4) for share in problem.profile.shares],
        "loss": _rounded(evicted(problem, tokens)),
        "key_bits": list(problem.key_bits),
        "value_bits": list(problem.value_bits),
        "key_loss": _rounded(quantised(problem, "key", whole)[..., 0, :]),
        "value_loss": _rounded(quantised(problem, "value", whole)[..., 0, :]),
    }


def _front(artifact: Artifact, parts: Parts) -> dict[str, list[dict[str, float]]]:
    """Predicted loss over bytes, with the default allocator and with equal budgets."""
    front: dict[str, list[dict[str, float]]] = {"optimal": [], "uniform": []}
    for share in SHARES:
        for name, points in front.items():
            try:
                plan = resolve(artifact, mem=f"{100 * share:g}%", allocator=name, parts=parts)
            except TargetError:
                continue  # below what sinks alone take
            if math.isfinite(plan.predicted_loss):
                points.append({"share": plan.bytes.resident / plan.bytes.full, "loss": plan.predicted_loss})
    return front


def _rounded(table: np.ndarray) -> Any:
    """Three digits are enough to draw, and keep the page small."""
    return [_rounded(row) if isinstance(row, np.ndarray) else float(f"{row:.3g}") for row in table]
