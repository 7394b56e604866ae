"""Attention's effects in C, for CPUs: the launcher of `effects.c`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kvcompile.kernels.attention_effects.values import Asked, Changes, Effects
from kvcompile.kernels.native import lanes
from kvcompile.kernels.softmax import Softmax

SOURCE = lanes.source("effects", "measuring losses")


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
    return lanes.library(SOURCE)


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
    outs, rows = [], [_rows(one, heads, dtype) for one in asked]
    for one in rows:
        out = torch.empty(heads, len(one.order), one.group, sets + others + len(changes.values), device="cpu")
        call = _Call(
            one.query.data_ptr(), one.gradient.data_ptr(),
            *((ctypes.c_void_p * 2)(stored[i].data_ptr(), one.own[i].data_ptr()) for i in range(2)),
            *(t.data_ptr() for t in (key_changes, value_changes, bin_of, one.last, out)),
            heads, len(one.order) * one.group, one.coded * one.group,
            (ctypes.c_int64 * 2)(length, one.count), (ctypes.c_int64 * 2)(stored.shape[2], one.own.shape[2]),
            head_dim, dtype == torch.bfloat16, len(changes.keys), len(changes.values), shares, bins, 0,
            torch.get_num_threads(), scaling / math.log(2),
        )  # fmt: skip
        lanes.run(library, "effects", call)
        outs.append(out)
    if changes.budgets == 1:  # so few numbers that operations cost more than what they do
        return _effects(torch.cat(outs, 1), changes, rows)
    return [effect for out, one in zip(outs, rows, strict=True) for effect in _effects(out, changes, [one])]


@dataclass(frozen=True, eq=False)
class _Rows:
    """A follow-up as C takes it: its rows in an `order` in which the first `coded` are those with other keys, and its
    `count` own tokens."""

    order: Tensor
    coded: int
    group: int
    query: Tensor
    gradient: Tensor
    own: Tensor
    count: int
    last: Tensor


def _rows(one: Asked, heads: int, dtype: torch.dtype) -> _Rows:
    """Made once for all changes that are asked about."""
    if dtype not in one.memo:
        place, group = torch.arange(len(one.places), device="cpu"), len(one.query) // heads
        order, coded = (place % one.step > 0).sort(stable=True).indices, -(-len(place) // one.step)
        query, gradient = (lanes.rows(t[:, order], heads, dtype) for t in (one.query, one.gradient))
        own = lanes.laid((one.own_keys, one.own_values), dtype)
        last = one.places[order].repeat_interleave(group).to(torch.int32)
        one.memo[dtype] = _Rows(order, coded, group, query, gradient, own, one.own_keys.shape[1], last)
    found: _Rows = one.memo[dtype]
    return found


def _effects(out: Tensor, changes: Changes, rows: Sequence[_Rows]) -> list[Effects]:
    """From sums of weights and of effects [H, T, G, numbers] of all follow-ups, one after the other, each in its
    order."""
    shares, bins = changes.entry.shape[2], changes.budgets + 1
    sets, others = 2 * shares * bins, 2 * len(changes.keys)
    mass, effect = out[..., :sets].unflatten(-1, (shares, bins, 2)).cumsum(-2).unbind(-1)  # [H, T, G, P, bins]
    whole = mass[..., :1, -1:], effect[..., :1, -1:]
    total = whole[1] / whole[0]  # [H, T, G, 1, 1]
    moved = effect[..., :-1] / mass[..., :-1].clamp_min(torch.finfo(torch.float32).tiny) - total
    # Nothing is lost where all is kept, whatever the order of summation says.
    all_kept = changes.entry.amax(1)[..., None] <= torch.arange(changes.budgets, device="cpu")  # [H, P, budgets]
    evicted = moved.sum(2).masked_fill(all_kept[:, None], 0.0)
    by_values = (out[..., sets + others :] / whole[0][..., 0]).sum(2)
    found, first = [], 0
    for one in rows:
        own, some = slice(first, first + len(one.order)), slice(first, first + one.coded)
        masses, effects = out[:, some, :, sets : sets + others].unflatten(-1, (-1, 2)).unbind(-1)
        by_keys = (effects / masses - total[:, some, :, 0]).sum(2)
        back = one.order.argsort()
        in_order = (part[:, own][:, back] for part in (evicted, by_values, total[..., 0, 0].sum(2)))
        found.append(Effects(next(in_order), by_keys, *in_order))
        first = own.stop
    return found
