"""A window for every layer, for engines that know layers alone: a JSON object with `max_attention_window`, a list of
tokens, and `sink_token_length`. The names are those of TensorRT-LLM's `KvCacheConfig`, which takes both as they are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvcompile.allocators.foreign import Windows
from kvcompile.artifacts import DTYPE_BITS, Artifact, ExchangeError, head_bytes, slot_bytes, token_limits
from kvcompile.formats.common import MOST_TOKENS, count, json_object, numbers, parsed, whole

FILE = "windows.json"


def contents(artifact: Artifact) -> dict[str, bytes]:
    """The window of a layer takes, in the cache's own type, at most the bytes that the layer takes now."""
    bits = DTYPE_BITS[artifact.target.dtype]
    size = head_bytes(artifact.budgets, artifact.model.head_dim, bits).sum(1)
    tokens = size // (artifact.model.num_kv_heads * slot_bytes("recent", artifact.model.head_dim, bits, bits))
    windows = np.minimum(tokens, token_limits(artifact.model.windows, artifact.target.context))
    whole_layers = windows >= artifact.target.context
    sinks = artifact.budgets.sink[~whole_layers] if not whole_layers.all() else artifact.budgets.sink
    return {FILE: json_object({"max_attention_window": windows.tolist(), "sink_token_length": int(sinks.max())})}


def read(path: Path) -> Windows:
    """Raises ExchangeError."""
    found = parsed(path, whole)
    windows = numbers(path, found, "max_attention_window", 1, integers=True)
    if windows.ndim != 1:
        raise ExchangeError(f"{path} has max_attention_window {windows.shape}: expected a list of tokens, a layer each")
    sink = count(path, found, "sink_token_length", 0) if "sink_token_length" in found else None
    return Windows(str(path), windows.clip(max=MOST_TOKENS).astype(np.int64), sink)
