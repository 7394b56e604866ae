"""The decode step in C, for CPUs: made with the machine's own compiler when it is first needed.

Where there is no C compiler, everything goes through torch; `KVCOMPILE_KERNELS=torch` leaves it alone.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvcompile.kernels.arguments import FIELDS, tensors
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs import CODECS, Codec
from kvcompile.kernels.codecs.base import EIGHTHS
from kvcompile.kernels.dispatch import CHOICE, knows
from kvcompile.kernels.layout import OTHER, LayerLayout
from kvcompile.kernels.native import build
from kvcompile.kernels.ragged_decode.totals import Totals
from kvcompile.kernels.regions import starts
from kvcompile.kernels.transform import Transform

SOURCE = Path(__file__).with_name("ragged.c")
HEADERS = tuple(
    Path(__file__).with_name(f"{name}.h")
    for name in ("store", "codecs", "vectors", "attention", "narrow", "packed", "wide", "chosen", "transform")
)
FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    # Sums may be reordered, so that they can be vectorised; divisions stay divisions, so that codes are those of torch.
    "-fassociative-math", "-fno-signed-zeros",
)  # fmt: skip


def _constants(codec: Codec) -> tuple[str, str]:
    """By which `codecs.h` knows a codec: its id, and bits and eighths of two sections."""
    name, sections = codec.load("native").CONSTANT, codec.sections or ((codec.bits, EIGHTHS),)
    numbers = [str(number) for section in (*sections, (0, 0))[:2] for number in section]
    return f"-D{name}={codec.id}", f"-D{name}_SECTIONS={{{','.join(numbers)}}}"


KNOWN = [codec for codec in CODECS.values() if codec.has("native")]
CONSTANTS = (f"-DKVC_GROUP={KNOWN[0].group}", *(option for codec in KNOWN for option in _constants(codec)))
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_DIM = 512


class _Side(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in FIELDS), ("steps", ctypes.c_int64 * len(FIELDS)),
        ("starts", ctypes.c_void_p),
    ]  # fmt: skip


class _Vectors(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("sequence", ctypes.c_int64), ("head", ctypes.c_int64)]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Vectors:
        """Those of one new token a sequence, [B, heads, D]."""
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


MATRICES = 6
"""Pointers of the C source's `Transform`."""


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _Vectors) for name in ("query", "new_keys", "new_values", "out")),
        ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("matrices", ctypes.c_void_p * MATRICES),
        *((name, ctypes.c_void_p) for name in ("rows", "seen", "places", "score", "scores", "scratch")),
        *((name, ctypes.c_int64) for name in ("step", "window", "room")),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "group", "batch", "type_in", "type", "threads", "dim")),
    ]  # fmt: skip


def usable(tensor: torch.Tensor, head_dim: int, layout: LayerLayout) -> bool:
    """Whether an operation of a layer on this tensor can be done here."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in TYPES
        and head_dim <= MOST_DIM
        and os.environ.get(CHOICE, "") == ""
        and knows("native", layout)
        and _library() is not None
    )


@cache
def _library() -> ctypes.CDLL | None:
    return build.library(SOURCE, (*FLAGS, *CONSTANTS), "the decode step", *HEADERS)


def _sides(keys: Buffers, values: Buffers, layout: LayerLayout) -> tuple[_Side, _Side]:
    """Keys and values as C knows them, made once for as long as their buffers stay where they are."""
    both = (*tensors(keys), *tensors(values))
    where = tuple((t.data_ptr(), t.stride(0)) for t in both)
    made = layout.memo.get("native sides")
    if made is None or made[0] != where:
        bits = [[getattr(c, name) for c in layout.classes] for name in ("k_bits", "v_bits")]
        first = [torch.tensor(starts(layout, side, keys.head_dim)) for side in bits]
        # `first` is kept with them, as they point to it.
        made = layout.memo["native sides"] = where, (_side(keys, first[0]), _side(values, first[1])), first
    found: tuple[_Side, _Side] = made[1]
    return found


def _side(stored: Buffers, first: torch.Tensor) -> _Side:
    every = tensors(stored)
    steps = (t.stride(0) * t.element_size() if t.numel() else 0 for t in every)
    return _Side(*(t.data_ptr() or None for t in every), (ctypes.c_int64 * len(every))(*steps), first.data_ptr())


def _matrices(transform: Transform | None, layout: LayerLayout) -> Any:
    """A transform's pointers, made once: matrices by which a vector is multiplied from the left, and means."""
    made = layout.memo.get("native matrices")
    if made is None or made[0] is not transform:
        t, kept = transform, list[torch.Tensor]()
        if t is not None:
            kept = [t.key.mT, t.key_inverse, t.key_mean, t.value.mT, t.value_inverse.mT, t.value_mean]
            kept = [one.contiguous() for one in kept]
        pointers = (ctypes.c_void_p * MATRICES)(*(one.data_ptr() for one in kept))
        made = layout.memo["native matrices"] = transform, pointers, kept
    return made[1]


def _numbers(batch: int, seen: Sequence[int] | torch.Tensor, places: torch.Tensor | None) -> list[torch.Tensor]:
    """`seen` and `places` int32 [batch]."""
    return [
        torch.as_tensor(seen, dtype=torch.int32).contiguous(),
        torch.arange(batch, dtype=torch.int32) if places is None else places.to(torch.int32).contiguous(),
    ]


def _rows(layout: LayerLayout) -> torch.Tensor:
    if "native" not in layout.memo:
        layout.memo["native"] = torch.tensor(layout.rows, dtype=torch.int32)
    rows: torch.Tensor = layout.memo["native"]
    return rows


def _at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _room(library: ctypes.CDLL, layout: LayerLayout, group: int, head_dim: int) -> int:
    """Numbers of scratch for a thread."""
    key = ("native room", group, head_dim)
    if key not in layout.memo:
        library.kvc_room.restype = ctypes.c_int64
        most = max(row.capacity for row in layout.rows)
        layout.memo[key] = library.kvc_room(ctypes.c_int64(most), group, head_dim)
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
    library, (batch, query_heads, head_dim), heads = _library(), query.shape, layout.num_kv_heads
    assert library is not None
    query, new_keys, new_values = (t if t.stride(2) == 1 else t.contiguous() for t in (query, new_keys, new_values))
    out = query.new_empty(batch, query_heads, head_dim)
    threads, group = torch.get_num_threads(), query_heads // heads
    room = _room(library, layout, group, head_dim)
    scratch = torch.empty(threads * room)
    numbers, sides = _numbers(batch, seen, places), _sides(keys, values, layout)
    by_head = None if score is None else score.float().contiguous()
    call = _Step(
        *map(_Vectors.of, (query, new_keys, new_values, out)), *map(ctypes.addressof, sides), _matrices(transform, layout),
        *(None if t is None else t.data_ptr() for t in (_rows(layout), *numbers, by_head, scores, scratch)),
        scores.stride(0), layout.window, room, scaling,
        heads, group, batch, TYPES[query.dtype], TYPES[keys.exact.dtype], threads, head_dim,
    )  # fmt: skip
    library.kvc_step(ctypes.byref(call))
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
    library, (batch, query_heads, _, head_dim), heads = _library(), query.shape, layout.num_kv_heads
    assert library is not None
    group = query_heads // heads
    asked = (query.float() * scaling).contiguous()
    out = torch.empty_like(asked)
    threads = torch.get_num_threads()
    room = _room(library, layout, group, head_dim)
    scratch = torch.empty(threads * room)
    numbers, sides = _numbers(batch, seen, places), _sides(keys, values, layout)
    every = None if totals is None else asked.new_empty(batch, query_heads, 1, 2)
    library.kvc_decode(
        _at(asked), ctypes.byref(sides[0]), ctypes.byref(sides[1]), _at(_rows(layout)), heads, TYPES[keys.exact.dtype],
        group, batch, *map(_at, numbers), ctypes.c_int64(layout.window), _at(out), _at(every), _at(scratch),
        ctypes.c_int64(room), threads, head_dim,
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
    library, (batch, heads, head_dim) = _library(), new_keys.shape
    assert library is not None
    k, v = new_keys.float().contiguous(), new_values.float().contiguous()
    by_head = None if score is None else score.float().contiguous()
    numbers, sides = _numbers(batch, seen, places), _sides(keys, values, layout)
    library.kvc_append(
        ctypes.byref(sides[0]), ctypes.byref(sides[1]), _at(_rows(layout)), heads, TYPES[keys.exact.dtype], batch,
        *map(_at, numbers), _at(k), _at(v), _at(by_head), _at(scores), ctypes.c_int64(scores.stride(0)),
        torch.get_num_threads(), head_dim,
    )  # fmt: skip
