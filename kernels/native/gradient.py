"""The gradient of attention in C, for CPUs: the launcher of `gradient.c`."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from kvcompile.kernels.native import lanes
from kvcompile.kernels.softmax import PLAIN, Softmax

SOURCE = lanes.source("gradient", "the gradient of attention")


class _Call(ctypes.Structure):
    _fields_ = [
        ("query", ctypes.c_void_p), ("upstream", ctypes.c_void_p),
        *((name, ctypes.c_void_p * 2) for name in ("keys", "values", "turned")),
        *((name, ctypes.c_void_p) for name in ("last", "by_query", "weights", "slopes")),
        ("heads", ctypes.c_int64), ("rows", ctypes.c_int64),
        ("counts", ctypes.c_int64 * 2), ("steps", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("dim", "pairs", "room", "threads")), ("scale", ctypes.c_float),
    ]  # fmt: skip


def usable(query: Tensor, keys: Tensor, window: int = 0, softmax: Softmax = PLAIN) -> bool:
    """Whether it can be done here."""
    fits = lanes.fits(query, keys, query.shape[1], window, softmax) and keys.shape[2] % lanes.STEP == 0
    return fits and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    return lanes.library(SOURCE)


def attention_gradient(
    query: Tensor, upstream: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attention_gradient.dense`."""
    library, (heads, length, head_dim), own = _library(), keys.shape, own_keys.shape[1]
    assert library is not None
    dtype = lanes.dtype_of(keys, bool(library.kvc_pairs()))
    pairs = dtype == torch.bfloat16
    stored = [lanes.laid(both, dtype) for both in ((keys, values), (own_keys, own_values))]
    turned = [lanes.turned(k, pairs) for k, _ in stored]
    rows, u = lanes.rows(query, heads, dtype), lanes.rows(upstream, heads, dtype)
    group = rows.shape[2]
    last = torch.arange(own, dtype=torch.int32, device="cpu").repeat_interleave(group)
    by_query = torch.empty(heads, own, group, head_dim, dtype=torch.float32, device="cpu")
    weights, slopes = torch.empty(2, heads, own, group, own, dtype=torch.float32, device="cpu")

    def both(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * 2)(*(t.data_ptr() for t in tensors))

    call = _Call(
        rows.data_ptr(), u.data_ptr(), *(both([part[i] for part in stored]) for i in range(2)), both(turned),
        *(t.data_ptr() for t in (last, by_query, weights, slopes)), heads, own * group,
        (ctypes.c_int64 * 2)(length, own), (ctypes.c_int64 * 2)(*(part.shape[2] for part in stored)),
        head_dim, pairs, 0, torch.get_num_threads(), scaling / math.log(2),
    )  # fmt: skip
    lanes.run(library, "gradient", call)

    def summed(by_row: Tensor, vectors: Tensor) -> Tensor:
        return by_row.flatten(1, 2).mT @ vectors.float().flatten(1, 2)

    return (
        by_query.mul_(scaling).transpose(1, 2).flatten(0, 1).to(query.dtype),
        summed(slopes, rows).mul_(scaling).to(own_keys.dtype),
        summed(weights, u).to(own_values.dtype),
    )
