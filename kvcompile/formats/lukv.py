"""LU-KV's budget curves: an array [99, L, H] of the share of a KV head's tokens to prune at 1 %, 2 %, ... 99 % in all.

Format: kvpress (`LUKVPress`) and github.com/baidu-baige/LU-KV, arXiv 2602.08585.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np

from kvcompile.allocators import least_bytes
from kvcompile.allocators.foreign import Curves
from kvcompile.allocators.optimal import Optimal
from kvcompile.artifacts import Artifact, ExchangeError
from kvcompile.assemble import stored_parts
from kvcompile.formats.common import numbers, parsed
from kvcompile.problem import Options, pose_with

LEVELS = 99
FILE = "curves.npy"


def contents(artifact: Artifact) -> dict[str, bytes]:
    """Solved anew at every level from the artifact's curves, with elements of the cache's own type."""
    target = artifact.target
    parts = stored_parts(artifact)
    options = Options(target.context, target.batch, kv_dtype=target.dtype)
    problem = pose_with(artifact.model, parts, target, options)
    full = artifact.bytes.full // target.batch
    pruned = []
    for level in range(1, LEVELS + 1):
        size = max(full * (LEVELS + 1 - level) // (LEVELS + 1), least_bytes(problem))
        plan = Optimal(integer_search=False)(dataclasses.replace(problem, target=size))
        pruned.append(1 - plan.capacity / problem.limit[:, None])
    file = io.BytesIO()
    np.save(file, np.asarray(pruned, np.float32), allow_pickle=False)
    return {FILE: file.getvalue()}


def read(path: Path) -> Curves:
    """Raises ExchangeError."""
    found = parsed(path, lambda data: np.load(io.BytesIO(data), allow_pickle=False))
    pruned = numbers(path, {"curves": found}, "curves")
    if pruned.ndim != 3 or len(pruned) != LEVELS or pruned.min() < 0 or pruned.max() > 1:
        raise ExchangeError(
            f"{path} has the shape {pruned.shape}: expected [{LEVELS}, layers, heads] of shares from 0 to 1"
        )
    return Curves(str(path), 1 - pruned)
