"""A window for every layer, for engines that know layers alone: a JSON object with `max_attention_window`, a list of
tokens, and `sink_token_length`. The names are those of TensorRT-LLM's `KvCacheConfig`, which takes both as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvcompile.artifacts import ExchangeError
from kvcompile.formats.base import Format
from kvcompile.formats.common import MOST_TOKENS, count, json_object, numbers, parsed, whole
from kvcompile.formats.values import Windows

FILE = "windows.json"


def owns(path: Path) -> bool:
    return path.suffix == ".json" and "max_attention_window" in parsed(path, whole)


def read(path: Path) -> Windows:
    """Raises ExchangeError."""
    found = parsed(path, whole)
    windows = numbers(path, found, "max_attention_window", 1, integers=True)
    if windows.ndim != 1:
        raise ExchangeError(f"{path} has max_attention_window {windows.shape}: expected a list of tokens, a layer each")
    sink = count(path, found, "sink_token_length", 0) if "sink_token_length" in found else None
    return Windows(str(path), windows.clip(max=MOST_TOKENS).astype(np.int64), sink)


def write(value: Windows) -> dict[str, bytes]:
    said: dict[str, Any] = {"max_attention_window": value.windows.tolist()}
    if value.sink is not None:
        said["sink_token_length"] = value.sink
    return {FILE: json_object(said)}


FORMAT = Format(read, write, owns, looks=".json")
