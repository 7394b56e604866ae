"""DuoAttention's head patterns: `full_attention_heads.tsv`, a gate in [0, 1] a KV head, and `config.json`.

Format: github.com/mit-han-lab/duo-attention (`attn_patterns`), arXiv 2410.10819.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from kvcompile.formats.base import Format
from kvcompile.formats.common import count, json_object, numbers, parsed, whole
from kvcompile.formats.values import Gates

TABLE, CONFIG = "full_attention_heads.tsv", "config.json"


def owns(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".tsv"


def read(path: Path) -> Gates:
    """From the folder, or the table beside its configuration. Raises ExchangeError."""
    folder = path if path.is_dir() else path.parent
    table = folder / TABLE if path.is_dir() else path
    gates = parsed(table, lambda data: np.loadtxt(io.BytesIO(data), dtype=np.float64, delimiter="\t", ndmin=2))
    config = folder / CONFIG
    sizes = parsed(config, whole)
    sink, recent = count(config, sizes, "sink_size", 0), count(config, sizes, "recent_size", 1)
    # A gate is trained freely and clipped where it is used.
    return Gates(str(path), np.clip(numbers(table, {"gates": gates}, "gates"), 0, 1), sink, recent)


def write(value: Gates) -> dict[str, bytes]:
    table = io.BytesIO()
    np.savetxt(table, value.gates, fmt="%.10f", delimiter="\t")
    return {TABLE: table.getvalue(), CONFIG: json_object({"sink_size": value.sink, "recent_size": value.recent})}


FORMAT = Format(read, write, owns, looks="a folder of DuoAttention's, or .tsv", folder=True)
