"""The C source of decode steps and cuts: made into a library when it is first needed, and what its functions take."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any, NamedTuple

import torch

from kvcompile.kernels.arguments import FIELDS, tensors
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs import CODECS, Codec
from kvcompile.kernels.codecs.base import EIGHTHS
from kvcompile.kernels.dispatch import CHOICE, knows
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.native import build
from kvcompile.kernels.regions import starts
from kvcompile.kernels.transform import Transform

HEADERS = (
    "store", "codecs", "vectors", "attention", "narrow", "transpose", "packed", "wide", "chosen", "transform", "cut",
    "items",
)  # fmt: skip
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
SOURCE = build.Source.named("ragged", HEADERS, (*FLAGS, *CONSTANTS), "the decode step")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_DIM = 512


class Side(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in FIELDS), ("steps", ctypes.c_int64 * len(FIELDS)),
        ("starts", ctypes.c_void_p),
    ]  # fmt: skip


MATRICES = 6
"""Pointers of the C source's `Transform`."""


def usable(tensor: torch.Tensor, head_dim: int, layout: LayerLayout) -> bool:
    """Whether an operation of a layer on this tensor can be done here."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in TYPES
        and head_dim <= MOST_DIM
        and os.environ.get(CHOICE, "") == ""
        and knows("native", layout)
        and library() is not None
    )


@cache
def library() -> ctypes.CDLL | None:
    return build.library(SOURCE)


class Sides(NamedTuple):
    """Keys and values as C knows them, the tensors that they point to beside those of the store, and what they were
    made for."""

    keys: Side
    values: Side
    kept: list[torch.Tensor]
    made_for: tuple[Any, ...]


def sides(keys: Buffers, values: Buffers, layout: LayerLayout) -> Sides:
    """Made once for as long as buffers stay where they are."""
    both = (*tensors(keys), *tensors(values))
    wanted = keys.head_dim, keys.exact.dtype, *((t.data_ptr(), t.stride(0), t.numel()) for t in both)
    found: Sides | None = layout.memo.get("native sides")
    if found is None or found.made_for != wanted:
        bits = [[getattr(c, name) for c in layout.classes] for name in ("k_bits", "v_bits")]
        first = [torch.tensor(starts(layout, side, keys.head_dim), device="cpu") for side in bits]
        found = Sides(_side(keys, first[0]), _side(values, first[1]), first, wanted)
        layout.memo["native sides"] = found
    return found


def _side(stored: Buffers, first: torch.Tensor) -> Side:
    every = tensors(stored)
    steps = (t.stride(0) * t.element_size() if t.numel() else 0 for t in every)
    return Side(*(t.data_ptr() or None for t in every), (ctypes.c_int64 * len(every))(*steps), first.data_ptr())


class Matrices(NamedTuple):
    """A transform as C knows it: matrices by which a vector is multiplied from the left, and means."""

    pointers: Any
    kept: list[torch.Tensor]
    made_for: Transform | None


def matrices(transform: Transform | None, layout: LayerLayout) -> Matrices:
    """Made once for each transform."""
    found: Matrices | None = layout.memo.get("native matrices")
    if found is None or found.made_for is not transform:
        t, kept = transform, list[torch.Tensor]()
        if t is not None:
            kept = [t.key.mT, t.key_inverse, t.key_mean, t.value.mT, t.value_inverse.mT, t.value_mean]
            kept = [one.contiguous() for one in kept]
        found = Matrices((ctypes.c_void_p * MATRICES)(*(one.data_ptr() for one in kept)), kept, transform)
        layout.memo["native matrices"] = found
    return found


def row_table(layout: LayerLayout) -> torch.Tensor:
    if "native" not in layout.memo:
        layout.memo["native"] = torch.tensor(layout.rows, dtype=torch.int32, device="cpu")
    rows: torch.Tensor = layout.memo["native"]
    return rows


def at(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
