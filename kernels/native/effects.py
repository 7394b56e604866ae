"""Attention's effects in C, for CPUs: the launcher of `effects.c`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kvcompile.kernels.attention_effects.values import Asked, Changes, Effects
from kvcompile.kernels.native import lanes
from kvcompile.kernels.softmax import Softmax


class _Call(ctypes.Structure):
    _fields_ = [
        ("query", ctypes.c_void_p), ("gradient", ctypes.c_void_p), ("keys", ctypes.c_void_p * 2),
        ("values", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("key_changes", "value_changes", "bin", "last", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "rows", "coded")),
        ("counts", ctypes.c_int64 * 2), ("steps", ctypes.c_int64 * 2),
        *(
            (name, ctypes.c_int64)
            for name in ("dim", "pairs", "key_sets", "value_sets", "shares", "bins", "room", "threads")
        ),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


def usable(asked: Sequence[Asked], keys: Tensor, window: int, softmax: Softmax) -> bool:
    """Whether it can be done here."""
    fits = all(lanes.fits(one.query, keys, one.own_keys.shape[1], window, softmax) for one in asked)
    return fits and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    return lanes.library("effects", "measuring losses")


def attention_effects(
    asked: Sequence[Asked], keys: Tensor, values: Tensor, changes: Changes, scaling: float
) -> list[Effects]:
    """See `attention_effects.api`; other keys and values as differences, so that bfloat16 has all of their digits that
    matter."""
    library, (heads, length, head_dim) = _library(), keys.shape
    assert library is not None
    dtype = lanes.dtype_of(keys, bool(library.kvc_pairs()))
    stored = lanes.laid((keys, values), dtype)
    key_changes, value_changes = lanes.laid(changes.keys, dtype), lanes.laid(changes.values, dtype)
    shares, bins = changes.entry.shape[2], changes.budgets + 1
    bin_of = torch.zeros(heads, shares, stored.shape[2], dtype=torch.int32, device="cpu")
    bin_of[..., :length] = changes.entry.mT
    sets, others = 2 * shares * bins, 2 * len(changes.keys)
    found = []
    for one in asked:
        group, some = len(one.query) // heads, range(0, len(one.places), one.step)
        order = [*some, *(i for i in range(len(one.places)) if i % one.step)]  # those with other keys first
        own = lanes.laid((one.own_keys, one.own_values), dtype)
        query, gradient = (lanes.rows(t[:, order], heads, dtype) for t in (one.query, one.gradient))
        last = one.places[order].repeat_interleave(group).to(torch.int32)
        out = torch.empty(
            heads, len(order), group, sets + others + len(changes.values), dtype=torch.float32, device="cpu"
        )
        steps = stored.shape[2], own.shape[2]
        call = _Call(
            query.data_ptr(), gradient.data_ptr(),
            *((ctypes.c_void_p * 2)(stored[i].data_ptr(), own[i].data_ptr()) for i in range(2)),
            *(t.data_ptr() for t in (key_changes, value_changes, bin_of, last, out)),
            heads, len(order) * group, len(some) * group,
            (ctypes.c_int64 * 2)(length, one.own_keys.shape[1]), (ctypes.c_int64 * 2)(*steps),
            head_dim, dtype == torch.bfloat16, len(changes.keys), len(changes.values), shares, bins, 0,
            torch.get_num_threads(), scaling / math.log(2),
        )  # fmt: skip
        lanes.run(library, "effects", call)
        found.append(_effects(out, changes, len(some), order))
    return found


def _effects(out: Tensor, changes: Changes, coded: int, order: list[int]) -> Effects:
    """From sums of weights and of effects [H, T, G, numbers], rows in `order`."""
    shares, bins = changes.entry.shape[2], changes.budgets + 1
    sets, others = 2 * shares * bins, 2 * len(changes.keys)
    mass, effect = out[..., :sets].unflatten(-1, (shares, bins, 2)).cumsum(-2).unbind(-1)  # [H, T, G, P, bins]
    whole = mass[..., :1, -1:], effect[..., :1, -1:]
    total = whole[1] / whole[0]  # [H, T, G, 1, 1]
    moved = effect[..., :-1] / mass[..., :-1].clamp_min(torch.finfo(torch.float32).tiny) - total
    # Nothing is lost where all is kept, whatever the order of summation says.
    all_kept = changes.entry.amax(1)[..., None] <= torch.arange(changes.budgets, device="cpu")  # [H, P, budgets]
    evicted = torch.empty_like(moved[:, :, 0])
    evicted[:, order] = moved.sum(2).masked_fill(all_kept[:, None], 0.0)
    by_values = torch.empty(*out.shape[:2], len(changes.values), dtype=torch.float32, device="cpu")
    by_values[:, order] = (out[..., sets + others :] / whole[0][..., 0]).sum(2)
    some = slice(0, coded)
    masses, effects = out[:, some, :, sets : sets + others].unflatten(-1, (-1, 2)).unbind(-1)
    by_keys = effects / masses - total[:, some, :, 0]
    in_order = torch.empty(out.shape[:2], dtype=torch.float32, device="cpu")
    in_order[:, order] = total[..., 0, 0].sum(2)
    return Effects(evicted, by_keys.sum(2), by_values, in_order)
