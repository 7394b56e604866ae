"""LU-KV's budget curves: an array [99, L, H] of the share of a KV head's tokens to prune at 1 %, 2 %, ... 99 % in all.

Format: kvpress (`LUKVPress`) and github.com/baidu-baige/LU-KV, arXiv 2602.08585.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from kvcompile.artifacts import ExchangeError
from kvcompile.formats.base import Format
from kvcompile.formats.common import numbers, parsed
from kvcompile.formats.values import Curves

LEVELS = 99
FILE = "curves.npy"


def owns(path: Path) -> bool:
    return path.suffix == ".npy"


def read(path: Path) -> Curves:
    """Raises ExchangeError."""
    found = parsed(path, lambda data: np.load(io.BytesIO(data), allow_pickle=False))
    pruned = numbers(path, {"curves": found}, "curves")
    if pruned.ndim != 3 or len(pruned) != LEVELS or pruned.min() < 0 or pruned.max() > 1:
        raise ExchangeError(
            f"{path} has the shape {pruned.shape}: expected [{LEVELS}, layers, heads] of shares from 0 to 1"
        )
    return Curves(str(path), 1 - pruned)


def write(value: Curves) -> dict[str, bytes]:
    """Raises ExchangeError for another number of levels."""
    if len(value.kept) != LEVELS:
        raise ExchangeError(f"LU-KV's file has no place for {len(value.kept)} levels: expected {LEVELS}")
    file = io.BytesIO()
    np.save(file, np.asarray(1 - value.kept, np.float32), allow_pickle=False)
    return {FILE: file.getvalue()}


FORMAT = Format(read, write, owns, looks=".npy")
