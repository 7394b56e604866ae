"""What an artifact's plan is in the words of other systems. L layers, H KV heads, Hq query heads."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators import least_bytes
from kvcompile.allocators.optimal import Optimal
from kvcompile.artifacts import DTYPE_BITS, POLICIES, Artifact, head_bytes, slot_bytes, token_limits
from kvcompile.assemble import stored_parts
from kvcompile.formats import Curves, Gates, Importance, Windows
from kvcompile.formats.lukv import LEVELS
from kvcompile.problem import Options, pose_with

SINK, RECENT = 128, 256
"""Streaming heads as DuoAttention's paper has them (arXiv 2410.10819)."""


def gates(artifact: Artifact) -> Gates:
    """Full heads have gate 1. Where all others are alike and of policy `recent` they have gate 0, and their sinks and
    ring are the streaming heads'; otherwise the gate is the share of tokens kept, and streaming heads are the paper's.
    """
    budgets, gate = artifact.budgets, kept_shares(artifact)
    streams = gate < 1
    shapes = {tuple(row) for row in np.stack([budgets.policy, budgets.sink, budgets.recent], -1)[streams].tolist()}
    sink, recent = SINK, RECENT
    if len(shapes) == 1 and next(iter(shapes))[0] == POLICIES.index("recent"):
        _, sink, recent = next(iter(shapes))
        gate = np.where(streams, 0.0, gate)
    return Gates(artifact.model.name, gate, sink, recent)


def curves(artifact: Artifact) -> Curves:
    """Solved anew at 99 %, 98 %, ... 1 % of the full cache from the artifact's curves, with elements of the cache
    dtype. Raises ArtifactError where it has none."""
    target = artifact.target
    problem = pose_with(
        artifact.model,
        stored_parts(artifact),
        target,
        Options(target.context, target.batch, kv_dtype=target.dtype),
    )
    full = artifact.bytes.full // target.batch
    kept = []
    for level in range(1, LEVELS + 1):
        size = max(full * (LEVELS + 1 - level) // (LEVELS + 1), least_bytes(problem))
        plan = Optimal(integer_search=False)(dataclasses.replace(problem, target=size))
        kept.append(plan.capacity / problem.limit[:, None])
    return Curves(artifact.model.name, np.asarray(kept))


def query_head_tokens(artifact: Artifact) -> Importance:
    """The weight of a query head is the number of tokens of its KV head, so that a division in proportion gives
    them."""
    group = artifact.model.num_attention_heads // artifact.model.num_kv_heads
    tokens = np.repeat(artifact.budgets.capacity.astype(np.float64), group, axis=1)
    return Importance(artifact.model.name, tokens)


def static_shares(artifact: Artifact) -> Importance:
    """The weight of a head is the share of its tokens that it keeps; heads of a sliding layer have none."""
    limits = np.array(token_limits(artifact.model.windows, artifact.target.context))
    static = limits == artifact.target.context
    return Importance(artifact.model.name, np.where(static[:, None], kept_shares(artifact), 0.0))


def windows(artifact: Artifact) -> Windows:
    """The window of a layer takes, in the cache dtype, at most the bytes that the layer takes now."""
    bits = DTYPE_BITS[artifact.target.dtype]
    size = head_bytes(artifact.budgets, artifact.model.head_dim, bits).sum(1)
    tokens = size // (artifact.model.num_kv_heads * slot_bytes("recent", artifact.model.head_dim, bits, bits))
    window = np.minimum(tokens, token_limits(artifact.model.windows, artifact.target.context))
    whole = window >= artifact.target.context
    # A layer that keeps everything has no use for sinks; the others share one number, so that of the most.
    sinks = artifact.budgets.sink[~whole] if not whole.all() else artifact.budgets.sink
    return Windows(artifact.model.name, window.astype(np.int64), int(sinks.max()))


def kept_shares(artifact: Artifact) -> NDArray[np.float64]:
    """The part of its tokens that every head keeps, [L, H]."""
    limits = np.array(token_limits(artifact.model.windows, artifact.target.context))
    shares: NDArray[np.float64] = artifact.budgets.capacity / limits[:, None]
    return shares
