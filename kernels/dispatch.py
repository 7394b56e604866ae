"""Which implementation an operation takes."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import LayerLayout

CHOICE = "KVCOMPILE_KERNELS"
"""Environment variable: `torch` keeps everything in torch, `triton` takes the kernels everywhere (on a CPU they need
Triton's interpreter); unset, tensors on a GPU get the kernels, and decode steps and prompts on a CPU those in C
(`native`)."""


def takes_kernels(tensor: torch.Tensor, layout: LayerLayout) -> bool:
    """Whether an operation of a layer on this tensor is done by Triton."""
    return prefers_kernels(tensor) and knows("triton", layout)


def prefers_kernels(tensor: torch.Tensor) -> bool:
    """The same of an operation that has nothing to do with how heads are stored."""
    choice = os.environ.get(CHOICE, "")
    return choice != "torch" and (tensor.is_cuda or choice == "triton") and _installed()


def knows(implementation: str, layout: LayerLayout) -> bool:
    """Whether every codec of the layer has this implementation (`triton`, `native`)."""
    key = ("knows", implementation)
    if key not in layout.memo:
        layout.memo[key] = all(codec_of(id).has(implementation) for id in layout.codecs)
    found: bool = layout.memo[key]
    return found


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Launches inside go to this device: Triton takes the current one, whatever device its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Operations inside have the dtypes of what they are given, as they do anyway where autocast knows no device."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
