"""The element type in which a processor multiplies fast enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor


def fast_dtype(dtype: torch.dtype, device: str | torch.device | None = None) -> torch.dtype:
    """`dtype`, or float32 where it is a 16-bit type that the CPU has no instructions for: torch then multiplies element
    by element, 80 times as slowly as in float32 on a processor with AVX2 alone. `device` defaults to cuda where there
    is one. Widening 16-bit weights is exact, and an artifact's cache keeps its own type."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if kind != "cpu" or dtype not in known:
        return dtype
    supported = getattr(torch.ops.mkldnn, known[dtype], None)
    return dtype if supported is None or supported() else torch.float32


ALIGNMENT = 64
"""Bytes of a cache line, at whose beginning torch puts what it allocates. Weights that are mapped from a file lie
anywhere, and matrix products on a CPU may differ in the last bits with the place."""


def aligned(tensor: Tensor) -> bool:
    """Whether a tensor begins where torch would have put it; on other devices than the CPU none of our business."""
    return tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0


def align(model: Any) -> None:
    """Move weights that lie elsewhere to where torch puts what it allocates, and let go of where they were."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not aligned(tensor):
            tensor.data = tensor.data.clone()


@contextmanager
def fast_arithmetic(model: Any) -> Iterator[None]:
    """Let a model compute in `fast_dtype` of its weights' type within the block, with the same bits wherever they lie;
    afterwards it is bit for bit as it was. Weights that are widened are not kept beside: rounding gives them back."""
    every = [*model.parameters(), *model.buffers()]
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in every)
    widened, moved = {}, {}
    for tensor in every:
        fast = fast_dtype(tensor.dtype, tensor.device)
        if fast != tensor.dtype and owners[tensor.untyped_storage().data_ptr()] == 1:
            widened[tensor] = tensor.dtype
        elif fast != tensor.dtype or not aligned(tensor):
            moved[tensor] = tensor.data  # one of several views of a storage, or in a file's mapped pages
        else:
            continue
        tensor.data = tensor.data.to(fast, copy=True)
    try:
        yield
    finally:
        for tensor, before in moved.items():
            tensor.data = before
        for tensor, dtype in widened.items():
            tensor.data = tensor.data.to(dtype)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within, the OpenBLAS that numpy and scipy bring has one thread: its others spin for a while after each call, and
    take the processor from torch's (docs/profiling.md)."""
    found = ThreadpoolController()
    brought = [
        one.filepath
        for one in found.lib_controllers
        if one.user_api == "blas"
        and {"numpy", "scipy"} & {part.split(".")[0] for part in Path(one.filepath).parts[-3:]}
    ]
    with found.select(filepath=brought).limit(limits=1):
        yield
