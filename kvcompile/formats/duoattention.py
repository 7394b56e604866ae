"""DuoAttention's head patterns: `full_attention_heads.tsv`, a gate in [0, 1] a KV head, and `config.json`.

Format: github.com/mit-han-lab/duo-attention (`attn_patterns`), arXiv 2410.10819.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from kvcompile.allocators.foreign import Gates
from kvcompile.artifacts import POLICIES, Artifact
from kvcompile.formats.common import count, json_object, kept_shares, numbers, parsed, whole

TABLE, CONFIG = "full_attention_heads.tsv", "config.json"
SINK, RECENT = 128, 256
"""Streaming heads as the paper has them."""


def contents(artifact: Artifact) -> dict[str, bytes]:
    """Full heads have gate 1. Where all others are alike and of policy `recent` they have gate 0, and their sinks and
    ring are the configuration; otherwise the gate is the share of tokens kept, and streaming heads are the paper's."""
    budgets, gates = artifact.budgets, kept_shares(artifact)
    narrow = gates < 1
    shapes = {tuple(row) for row in np.stack([budgets.policy, budgets.sink, budgets.recent], -1)[narrow].tolist()}
    sink, recent = SINK, RECENT
    if len(shapes) == 1 and next(iter(shapes))[0] == POLICIES.index("recent"):
        _, sink, recent = next(iter(shapes))
        gates = np.where(narrow, 0.0, gates)
    table = io.BytesIO()
    np.savetxt(table, gates, fmt="%.10f", delimiter="\t")
    return {TABLE: table.getvalue(), CONFIG: json_object({"sink_size": int(sink), "recent_size": int(recent)})}


def read(path: Path) -> Gates:
    """From the folder, or the table beside its configuration. Raises ExchangeError."""
    folder = path if path.is_dir() else path.parent
    table = folder / TABLE if path.is_dir() else path
    gates = parsed(table, lambda data: np.loadtxt(io.BytesIO(data), dtype=np.float64, delimiter="\t", ndmin=2))
    config = folder / CONFIG
    sizes = parsed(config, whole)
    sink, recent = count(config, sizes, "sink_size", 0), count(config, sizes, "recent_size", 1)
    return Gates(str(path), np.clip(numbers(table, {"gates": gates}, "gates"), 0, 1), sink, recent)
