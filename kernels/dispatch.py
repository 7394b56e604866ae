"""Which implementation an operation takes."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

CHOICE = "KVCOMPILE_KERNELS"
"""Environment variable: `torch` keeps everything in torch, `triton` takes the kernels everywhere (on a CPU they need
Triton's interpreter); unset, tensors on a GPU get the kernels, and decode steps on a CPU those in C (`native`)."""


def takes_kernels(tensor: torch.Tensor) -> bool:
    """Whether an operation on this tensor is done by Triton."""
    choice = os.environ.get(CHOICE, "")
    return choice != "torch" and (tensor.is_cuda or choice == "triton") and _installed()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
