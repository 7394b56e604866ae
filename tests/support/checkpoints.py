"""Tiny models in folders of several safetensors files, whole and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvcompile.models.arithmetic import align
from kvcompile.models.streamed import stream


def saved(model: Any, folder: Path, shard: str = "20KB") -> Path:
    """The folder, with the model in it."""
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def whole(folder: Path, dtype: Any = None) -> Any:
    """Held whole, as `load` holds a model that is to be profiled."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    align(model)
    return model


def streamed(folder: Path, dtype: Any = None) -> Any:
    return stream(folder, AutoConfig.from_pretrained(folder), "tiny", dtype, torch.device("cpu"))
