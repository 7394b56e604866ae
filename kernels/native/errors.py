"""Weights of errors in C, for CPUs: the launcher of `errors.c`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kvcompile.kernels.error_weights.values import Rows, Weights
from kvcompile.kernels.native import lanes
from kvcompile.kernels.softmax import Softmax

SOURCE = lanes.source("errors", "measuring moments")


class _Call(ctypes.Structure):
    _fields_ = [
        ("query", ctypes.c_void_p), ("keys", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("values", "turned", "last", "metric", "energy", "by_token", "by_row")),
        *((name, ctypes.c_int64) for name in ("num_heads", "group", "rows")),
        ("counts", ctypes.c_int64 * 2), ("steps", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("dim", "pairs", "room", "threads")), ("scale", ctypes.c_float),
    ]  # fmt: skip


def usable(query: Tensor, keys: Tensor, own_keys: Tensor, window: int, softmax: Softmax) -> bool:
    """Whether it can be done here."""
    fits = lanes.fits(query, keys, own_keys.shape[1], window, softmax) and keys.shape[2] % lanes.STEP == 0
    return fits and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    found = lanes.library(SOURCE)
    if found is not None:
        found.kvc_errors_rows.restype = ctypes.c_int64
    return found


def error_weights(asked: Sequence[Rows], keys: Tensor, values: Tensor, metric: Tensor, scaling: float) -> list[Weights]:
    """See `error_weights.api`."""
    library, (heads, length, head_dim), num_heads = _library(), keys.shape, len(metric)
    assert library is not None
    dtype = lanes.dtype_of(keys, bool(library.kvc_pairs()))
    pairs, group = dtype == torch.bfloat16, num_heads // heads
    stored = lanes.laid((keys, values), dtype)
    turned, metric = lanes.turned(stored[1], pairs), metric.float().contiguous()
    v = values.float()[:, None]
    energy = ((v @ metric.unflatten(0, (heads, group)).mT) * v).sum(-1)  # v'Mv, [H, G, n]
    found = []
    for rows in asked:
        query, own = rows.query.to(dtype).contiguous(), lanes.laid((rows.own_keys,), dtype)
        count, last = query.shape[1], rows.places.to(torch.int32)
        strips = -(-count // library.kvc_errors_rows())
        by_token = torch.empty(strips, num_heads, 2, length, dtype=torch.float32, device="cpu")
        by_row = torch.empty(num_heads, 2, count, dtype=torch.float32, device="cpu")
        call = _Call(
            query.data_ptr(), (ctypes.c_void_p * 2)(stored[0].data_ptr(), own.data_ptr()), stored[1].data_ptr(),
            *(t.data_ptr() for t in (turned, last, metric, energy, by_token, by_row)), num_heads, group, count,
            (ctypes.c_int64 * 2)(length, rows.own_keys.shape[1]), (ctypes.c_int64 * 2)(stored.shape[2], own.shape[2]),
            head_dim, pairs, 0, torch.get_num_threads(), scaling / math.log(2),
        )  # fmt: skip
        lanes.run(library, "errors", call)
        by_key, by_value = by_token.sum(0).unflatten(0, (heads, group)).sum(1).unbind(1)
        found.append(Weights(by_key, by_value, by_row[:, 0], by_row[:, 1].sum(1)))
    return found
