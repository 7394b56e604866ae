"""Attention's effects in C, for CPUs: the launcher of `effects.c`."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kvcompile.kernels.attention_effects.values import Asked, Changes, Effects
from kvcompile.kernels.dispatch import CHOICE
from kvcompile.kernels.native import build
from kvcompile.kernels.native.prompt import ALIGNED, FLAGS
from kvcompile.kernels.softmax import Softmax

SOURCE = Path(__file__).with_name("effects.c")
HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("products", "rows", "transpose"))
STEP = 8
"""Of as many tokens there is a multiple."""


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
    """Whether it can be done here: a plain softmax on a CPU, and nothing outside of a window."""
    longest = keys.shape[1] + max((one.own_keys.shape[1] for one in asked), default=0)
    return (
        keys.device.type == "cpu"
        and softmax.plain
        and not 0 < window < longest
        and keys.shape[2] % 2 == 0
        and all(one.query.numel() > 0 for one in asked)
        and os.environ.get(CHOICE, "") == ""
        and _library() is not None
    )


@cache
def _library() -> ctypes.CDLL | None:
    found = build.library(SOURCE, FLAGS, "measuring losses", *HEADERS)
    if found is not None:
        found.kvc_effects_room.restype = found.kvc_effects_pairs.restype = ctypes.c_int64
    return found


def attention_effects(
    asked: Sequence[Asked], keys: Tensor, values: Tensor, changes: Changes, scaling: float
) -> list[Effects]:
    """See `attention_effects.api`; other keys and values as differences, so that bfloat16 has all of their digits that
    matter."""
    library, (heads, length, head_dim) = _library(), keys.shape
    assert library is not None
    pairs = keys.dtype == torch.bfloat16 and bool(library.kvc_effects_pairs())
    dtype = torch.bfloat16 if pairs else torch.float32

    def laid(*tensors: Tensor) -> Tensor:
        """[number of tensors, H, n, D], n a multiple of `STEP`."""
        count = tensors[0].shape[1] if tensors else 0
        out = torch.zeros(len(tensors), heads, -(-count // STEP) * STEP, head_dim, dtype=dtype)
        for i, tensor in enumerate(tensors):
            out[i, :, :count] = tensor
        return out

    stored, key_changes, value_changes = laid(keys, values), laid(*changes.keys), laid(*changes.values)
    shares, bins = changes.entry.shape[2], changes.budgets + 1
    bin_of = torch.zeros(heads, shares, stored.shape[2], dtype=torch.int32)
    bin_of[..., :length] = changes.entry.mT
    sets, others = 2 * shares * bins, 2 * len(changes.keys)
    found = []
    for one in asked:
        group, some = len(one.query) // heads, range(0, len(one.places), one.step)
        order = [*some, *(i for i in range(len(one.places)) if i % one.step)]  # those with other keys first
        own = laid(one.own_keys, one.own_values)
        # [H, T, G, D]: rows of a KV head one after another.
        query, gradient = (
            t[:, order].unflatten(0, (heads, group)).transpose(1, 2).to(dtype).contiguous()
            for t in (one.query, one.gradient)
        )
        last = one.places[order].repeat_interleave(group).to(torch.int32).contiguous()
        out = torch.empty(heads, len(order), group, sets + others + len(changes.values))
        steps = stored.shape[2], own.shape[2]
        call = _Call(
            query.data_ptr(), gradient.data_ptr(),
            *((ctypes.c_void_p * 2)(stored[i].data_ptr(), own[i].data_ptr()) for i in range(2)),
            *(t.data_ptr() for t in (key_changes, value_changes, bin_of, last, out)),
            heads, len(order) * group, len(some) * group,
            (ctypes.c_int64 * 2)(length, one.own_keys.shape[1]), (ctypes.c_int64 * 2)(*steps),
            head_dim, pairs, len(changes.keys), len(changes.values), shares, bins, 0, torch.get_num_threads(),
            scaling / math.log(2),
        )  # fmt: skip
        at = ctypes.byref(call)
        call.room = library.kvc_effects_room(at)
        scratch = torch.empty(call.threads * call.room + ALIGNED, dtype=torch.uint8)
        library.kvc_effects(at, ctypes.c_void_p(-(-scratch.data_ptr() // ALIGNED) * ALIGNED))
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
    all_kept = changes.entry.amax(1)[..., None] <= torch.arange(changes.budgets)  # [H, P, budgets]
    evicted = torch.empty_like(moved[:, :, 0])
    evicted[:, order] = moved.sum(2).masked_fill(all_kept[:, None], 0.0)
    by_values = torch.empty(*out.shape[:2], len(changes.values))
    by_values[:, order] = (out[..., sets + others :] / whole[0][..., 0]).sum(2)
    some = slice(0, coded)
    masses, effects = out[:, some, :, sets : sets + others].unflatten(-1, (-1, 2)).unbind(-1)
    by_keys = effects / masses - total[:, some, :, 0]
    return Effects(evicted, by_keys.sum(2), by_values)
