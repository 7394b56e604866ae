"""Decode steps in C: the launchers of `ragged.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.layout import OTHER, LayerLayout
from kvcompile.kernels.native.library import MATRICES, TYPES, at, library, matrices, row_table, sides, usable
from kvcompile.kernels.ragged_decode.totals import Totals
from kvcompile.kernels.transform import Transform


class _Vectors(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("sequence", ctypes.c_int64), ("head", ctypes.c_int64)]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Vectors:
        """Those of one new token a sequence, [B, heads, D]."""
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _Vectors) for name in ("query", "new_keys", "new_values", "out")),
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("matrices", ctypes.c_void_p * MATRICES),
        *((name, ctypes.c_void_p) for name in ("rows", "seen", "places", "score", "scores", "scratch")),
        *((name, ctypes.c_int64) for name in ("step", "window", "room")),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "group", "batch", "type_in", "type", "threads", "dim")),
    ]  # fmt: skip


def _numbers(batch: int, seen: Sequence[int] | torch.Tensor, places: torch.Tensor | None) -> list[torch.Tensor]:
    """`seen` and `places` int32 [batch]."""
    return [
        torch.as_tensor(seen, dtype=torch.int32, device="cpu").contiguous(),
        torch.arange(batch, dtype=torch.int32, device="cpu") if places is None else places.to(torch.int32).contiguous(),
    ]


def _room(made: ctypes.CDLL, layout: LayerLayout, group: int, head_dim: int) -> int:
    """Numbers of scratch for a thread."""
    key = ("native room", group, head_dim)
    if key not in layout.memo:
        made.kvc_room.restype = ctypes.c_int64
        most = max(row.capacity for row in layout.rows)
        layout.memo[key] = made.kvc_room(ctypes.c_int64(most), group, head_dim)
    room: int = layout.memo[key]
    return room


def takes_steps(query: torch.Tensor, layout: LayerLayout) -> bool:
    """Whether `step` can be done here: there are no heads whose policy places tokens itself."""
    key = "native steps"
    if key not in layout.memo:
        layout.memo[key] = all(row.kind != OTHER for row in layout.rows)
    return layout.memo[key] and query.dtype in TYPES and usable(query, query.shape[-1], layout)


def step(
    query: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    scores: torch.Tensor,
    layout: LayerLayout,
    transform: Transform | None,
    score: torch.Tensor | None,
    seen: Sequence[int] | torch.Tensor,
    scaling: float,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """All of a layer's decode step in one call: what `Transform`, `append` and `ragged_decode` do one after the other,
    in float32 in between. `query` [B, num_heads, D], `new_keys` and `new_values` [B, num_kv_heads, D], of one dtype and
    as the model has them; `score`, `seen` (without the new token) and `places` as in `append`. As `query`."""
    made, (batch, query_heads, head_dim), heads = library(), query.shape, layout.num_kv_heads
    assert made is not None
    query, new_keys, new_values = (t if t.stride(2) == 1 else t.contiguous() for t in (query, new_keys, new_values))
    out = query.new_empty(batch, query_heads, head_dim)
    threads, group = torch.get_num_threads(), query_heads // heads
    room = _room(made, layout, group, head_dim)
    scratch = torch.empty(threads * room, dtype=torch.float32, device=query.device)
    numbers, both = _numbers(batch, seen, places), sides(keys, values, layout)
    by_head, moved = None if score is None else score.float().contiguous(), matrices(transform, layout)
    call = _Step(
        *map(_Vectors.of, (query, new_keys, new_values, out)),
        *map(ctypes.addressof, both[:2]), moved.pointers,
        *(None if t is None else t.data_ptr() for t in (row_table(layout), *numbers, by_head, scores, scratch)),
        scores.stride(0), layout.window, room, scaling,
        heads, group, batch, TYPES[query.dtype], TYPES[keys.exact.dtype], threads, head_dim,
    )  # fmt: skip
    made.kvc_step(ctypes.byref(call))
    return out


def one_token(
    query: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    seen: Sequence[int] | torch.Tensor,
    scaling: float,
    places: torch.Tensor | None = None,
    totals: Totals | None = None,
) -> torch.Tensor:
    """Attention [B, num_heads, 1, D] of one stored token a sequence; see `ragged_decode.api`."""
    made, (batch, query_heads, _, head_dim), heads = library(), query.shape, layout.num_kv_heads
    assert made is not None
    group = query_heads // heads
    asked = (query.float() * scaling).contiguous()
    out = torch.empty_like(asked)
    threads = torch.get_num_threads()
    room = _room(made, layout, group, head_dim)
    scratch = torch.empty(threads * room, dtype=torch.float32, device=query.device)
    numbers, both = _numbers(batch, seen, places), sides(keys, values, layout)
    every = None if totals is None else asked.new_empty(batch, query_heads, 1, 2)
    made.kvc_decode(
        at(asked), ctypes.byref(both.keys), ctypes.byref(both.values), at(row_table(layout)), heads,
        TYPES[keys.exact.dtype], group, batch, *map(at, numbers), ctypes.c_int64(layout.window),
        at(out), at(every), at(scratch), ctypes.c_int64(room), threads, head_dim,
    )  # fmt: skip
    if totals is not None and every is not None:
        totals.logarithm = every[..., 0] + every[..., 1].log()
    return out.to(query.dtype)


def append(
    keys: Buffers,
    values: Buffers,
    scores: torch.Tensor,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    score: torch.Tensor | None,
    seen: Sequence[int] | torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """See `append.api`."""
    made, (batch, heads, head_dim) = library(), new_keys.shape
    assert made is not None
    k, v = new_keys.float().contiguous(), new_values.float().contiguous()
    by_head = None if score is None else score.float().contiguous()
    numbers, both = _numbers(batch, seen, places), sides(keys, values, layout)
    made.kvc_append(
        ctypes.byref(both.keys), ctypes.byref(both.values), at(row_table(layout)), heads,
        TYPES[keys.exact.dtype], batch, *map(at, numbers), at(k), at(v),
        at(by_head), at(scores), ctypes.c_int64(scores.stride(0)), torch.get_num_threads(), head_dim,
    )  # fmt: skip
