"""Tangram's cluster maps and retention profiles: npz archives of arrays by layer and KV head.

A map puts heads of like retention (`rank_score`) into clusters of `page_group_size`, which share blocks of memory, so
that each takes what the largest of its cluster takes. Format: github.com/aiha-lab/tangram
(`tools/head_group_clustering`), arXiv 2606.06302. Layers with a sliding window are left out of it.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import ExchangeError
from kvcompile.formats.base import Format
from kvcompile.formats.common import count, numbers, parsed
from kvcompile.formats.values import Curves, Importance

FILE = "cluster_map.npz"
GROUPS = (4, 2, 1)
"""Heads in a cluster: the first that divides their number; 4 is what Tangram's own maps have."""
ARRAYS = ("ratio_per_head", "rank_score", "cluster_of", "page_group_size")


def owns(path: Path) -> bool:
    return path.suffix == ".npz"


def read(path: Path) -> Importance | Curves:
    """A cluster map, or the retention profile that one is made from. Raises ExchangeError."""
    arrays = parsed(path, _arrays)
    if "ratio_per_head" in arrays:
        kept = numbers(path, arrays, "ratio_per_head", 0)
        if kept.ndim != 3 or kept.max() > 1:
            raise ExchangeError(f"{path} has ratio_per_head {kept.shape}: expected [levels, layers, heads] up to 1")
        return Curves(str(path), kept)
    score, cluster_of = numbers(path, arrays, "rank_score", 0), numbers(path, arrays, "cluster_of", 0)
    size = count(path, arrays, "page_group_size", 1)
    _, clusters, counts = np.unique(cluster_of, return_inverse=True, return_counts=True)
    if score.ndim != 2 or cluster_of.shape != score.shape or (counts != size).any():
        raise ExchangeError(f"{path} is no cluster map: expected every head in a cluster of {size} heads")
    clusters = clusters.reshape(score.shape)
    largest = np.zeros(len(counts))
    np.maximum.at(largest, clusters, score)
    return Importance(str(path), largest[clusters])


def write(value: Importance) -> dict[str, bytes]:
    """A cluster map over all layers that have any weight (scope `global`), for the model that `value.source` names."""
    static = np.flatnonzero(value.weights.any(axis=1))
    score = value.weights[static].astype(np.float32)
    size = next(size for size in GROUPS if score.size % size == 0)
    # Neighbours in order of score make a cluster; within it heads stand in order of layer and head.
    clusters = np.argsort(-score, axis=None, kind="stable").reshape(-1, size)
    members = np.stack(np.unravel_index(np.sort(clusters, axis=1), score.shape), -1).astype(np.int32)
    cluster_of, column_of = (np.zeros(score.shape, np.int32) for _ in range(2))
    for cluster, heads in enumerate(members):
        for column, (layer, head) in enumerate(heads):
            cluster_of[layer, head], column_of[layer, head] = cluster, column
    meta = {
        "source_model": value.source, "page_group_size": size, "num_layers": len(static),
        "static_layer_ids": static.tolist(), "num_kv_heads": score.shape[1], "num_clusters": len(members),
        "cluster_scope": "global",
    }  # fmt: skip
    file = io.BytesIO()
    np.savez(
        file, cluster_of=cluster_of, column_of=column_of, cluster_members=members, rank_score=score,
        page_group_size=np.int32(size), base_ratio=np.float32(score.mean()),
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
    )  # fmt: skip
    return {FILE: file.getvalue()}


def _arrays(data: bytes) -> dict[str, NDArray[np.generic]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in ARRAYS if name in file}


FORMAT = Format(read, write, owns, looks=".npz")
