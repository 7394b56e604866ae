"""Peaks of attention in C, for CPUs: the launcher of `peaks.c`."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from kvcompile.kernels.native import lanes
from kvcompile.kernels.softmax import Softmax

SOURCE = lanes.source("peaks", "measuring utilities")


class _Call(ctypes.Structure):
    _fields_ = [
        ("query", ctypes.c_void_p), ("keys", ctypes.c_void_p * 2), ("last", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("heads", ctypes.c_int64), ("rows", ctypes.c_int64),
        ("counts", ctypes.c_int64 * 2), ("steps", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("dim", "pairs", "room", "threads")), ("scale", ctypes.c_float),
    ]  # fmt: skip


def usable(query: Tensor, keys: Tensor, own_keys: Tensor, window: int, softmax: Softmax) -> bool:
    """Whether it can be done here."""
    return lanes.fits(query, keys, own_keys.shape[1], window, softmax) and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    found = lanes.library(SOURCE)
    if found is not None:
        found.kvc_peaks_rows.restype = ctypes.c_int64
    return found


def attention_peaks(query: Tensor, keys: Tensor, own_keys: Tensor, places: Tensor, scaling: float) -> Tensor:
    """See `attention_peaks.api`."""
    library, (heads, length, head_dim) = _library(), keys.shape
    assert library is not None
    dtype = lanes.dtype_of(keys, bool(library.kvc_pairs()))
    stored, own = lanes.laid((keys,), dtype), lanes.laid((own_keys,), dtype)
    query = lanes.rows(query, heads, dtype)
    count, group = query.shape[1:3]
    last = places.repeat_interleave(group).to(torch.int32)
    out = torch.empty(-(-count * group // library.kvc_peaks_rows()), heads, length, dtype=torch.float32, device="cpu")
    call = _Call(
        query.data_ptr(), (ctypes.c_void_p * 2)(stored.data_ptr(), own.data_ptr()), last.data_ptr(), out.data_ptr(),
        heads, count * group, (ctypes.c_int64 * 2)(length, own_keys.shape[1]),
        (ctypes.c_int64 * 2)(stored.shape[2], own.shape[2]), head_dim, dtype == torch.bfloat16, 0,
        torch.get_num_threads(), scaling / math.log(2),
    )  # fmt: skip
    lanes.run(library, "peaks", call)
    return out.amax(0).exp2_()
