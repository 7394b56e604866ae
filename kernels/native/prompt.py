"""Exact attention of prompts in C, for CPUs: the launcher of `prompt.c`."""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache

import torch

from kvcompile.kernels.dispatch import CHOICE
from kvcompile.kernels.native import build

FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
SOURCE = build.Source.named("prompt", ("products", "rows", "transpose"), FLAGS, "attention of prompts")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
MOST_DIM = 512
STEP = 8
"""Heads are multiples of so many elements, those that are summed in registers at once."""
MATRIX_UNITS = {"amx_bf16", "bf16"}
"""What /proc/cpuinfo says of x86 and ARM processors that multiply whole matrices of bfloat16: torch uses them."""
ALIGNED = 64


class _Tensor(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("steps", ctypes.c_int64 * 3)]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, _Tensor) for name in ("query", "keys", "values", "out")),
        *((name, ctypes.c_void_p) for name in ("pad", "kept", "sinks")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "batch", "heads", "group", "length", "columns", "dim", "type", "window", "rows", "room", "threads",
            )
        ),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


def usable(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> bool:
    """Whether attention of these tensors can be done here: on a CPU, without gradients, vectors in one piece."""
    tensors, head_dim = (query, keys, values), query.shape[3]
    return (
        all(t.device.type == "cpu" and t.dtype == query.dtype and t.stride(3) == 1 for t in tensors)
        and query.dtype in TYPES
        and head_dim <= MOST_DIM
        and head_dim % STEP == 0
        and query.numel() > 0
        and scaling > 0
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and os.environ.get(CHOICE, "") == ""
        and not (query.dtype == torch.bfloat16 and _multiplies_matrices())
        and _library() is not None
    )


@cache
def _multiplies_matrices() -> bool:
    return not MATRIX_UNITS.isdisjoint(build.processor().split())


@cache
def _library() -> ctypes.CDLL | None:
    found = build.library(SOURCE)
    if found is not None:
        found.kvc_prompt_rows.restype = found.kvc_prompt_room.restype = ctypes.c_int64
    return found


def _tensor(tensor: torch.Tensor) -> _Tensor:
    return _Tensor(tensor.data_ptr(), (ctypes.c_int64 * 3)(*tensor.stride()[:3]))


def prompt_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pad: torch.Tensor | None,
    window: int,
    scaling: float,
    kept: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `prompt_attention.api`; `sinks` f32 [num_heads]."""
    library, (batch, query_heads, length, head_dim), heads = _library(), query.shape, keys.shape[1]
    assert library is not None
    # In memory as the projection after attention reads it.
    out = query.new_empty(batch, length, query_heads, head_dim).transpose(1, 2)
    pad = None if pad is None else pad.to(torch.int64).contiguous()
    kept = None if kept is None else kept.contiguous()
    sinks = None if sinks is None else (sinks.float() / math.log(2)).contiguous()
    call = _Call(
        *map(_tensor, (query, keys, values, out)), *(None if t is None else t.data_ptr() for t in (pad, kept, sinks)),
        batch, heads, query_heads // heads, length, keys.shape[2], head_dim, TYPES[query.dtype], window, 0, 0,
        torch.get_num_threads(), scaling / math.log(2),
    )  # fmt: skip
    at = ctypes.byref(call)
    call.rows = library.kvc_prompt_rows(at)
    call.room = library.kvc_prompt_room(at)
    call.threads = min(call.threads, batch * heads * -(-length * call.group // call.rows))
    scratch = torch.empty(call.threads * call.room + ALIGNED, dtype=torch.uint8, device="cpu")
    library.kvc_prompt(at, ctypes.c_void_p(-(-scratch.data_ptr() // ALIGNED) * ALIGNED))
    return out
