"""How the C sources with strips of rows (`strips.h`) take vectors, and how they are called."""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

from kvcompile.kernels.dispatch import CHOICE
from kvcompile.kernels.native import build
from kvcompile.kernels.native.prompt import ALIGNED, FLAGS
from kvcompile.kernels.softmax import Softmax

HEADERS = ("strips", "products", "rows", "transpose")
STEP = 8
"""Of as many tokens there is a multiple."""


def source(name: str, what: str) -> build.Source:
    """The C source of this name."""
    return build.Source.named(name, HEADERS, FLAGS, what)


def library(source: build.Source) -> ctypes.CDLL | None:
    """A C source, or None where it cannot be compiled."""
    found = build.library(source)
    if found is not None:
        found.kvc_pairs.restype = getattr(found, f"kvc_{source.file.stem}_room").restype = ctypes.c_int64
    return found


def fits(query: Tensor, keys: Tensor, own: int, window: int, softmax: Softmax) -> bool:
    """Whether attention to a context and `own` tokens is a plain softmax on a CPU, with nothing outside of a window."""
    return (
        keys.device.type == "cpu"
        and softmax.plain
        and not 0 < window < keys.shape[1] + own
        and keys.shape[2] % 2 == 0
        and query.numel() > 0
        and keys.numel() > 0
        and os.environ.get(CHOICE, "") == ""
    )


def dtype_of(stored: Tensor, pairs: bool) -> torch.dtype:
    """What vectors are multiplied as, where a processor multiplies `pairs` of bfloat16 or does not."""
    return torch.bfloat16 if pairs and stored.dtype == torch.bfloat16 else torch.float32


def laid(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """Tensors [H, n, D] one after another, n a multiple of `STEP`: [number of tensors, H, n, D]."""
    if not tensors:
        return torch.zeros(0, dtype=dtype, device="cpu")
    heads, count, head_dim = tensors[0].shape
    out = torch.zeros(len(tensors), heads, -(-count // STEP) * STEP, head_dim, dtype=dtype, device="cpu")
    for i, tensor in enumerate(tensors):
        out[i, :, :count] = tensor
    return out


def turned(stored: Tensor, pairs: bool) -> Tensor:
    """What `laid` gave of one tensor, [H, n, D], with the elements of two neighbouring tokens side by side."""
    return stored.unflatten(1, (-1, 2)).mT.contiguous() if pairs else stored


def rows(vectors: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Vectors [num_heads, T, D] by KV head, token and query head of the group: [H, T, G, D]."""
    return vectors.unflatten(0, (heads, -1)).transpose(1, 2).to(dtype).contiguous()


def run(library: ctypes.CDLL, name: str, call: ctypes.Structure) -> None:
    """Call a function with scratch memory for each thread."""
    at = ctypes.byref(call)
    room = getattr(library, f"kvc_{name}_room")(at)
    call.room = room
    scratch = torch.empty(torch.get_num_threads() * room + ALIGNED, dtype=torch.uint8, device="cpu")
    getattr(library, f"kvc_{name}")(at, ctypes.c_void_p(-(-scratch.data_ptr() // ALIGNED) * ALIGNED))
