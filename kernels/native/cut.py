"""Cutting prompts down to the budget in C: the launcher of `cut.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from kvcompile.kernels.arguments import COLUMNS
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.native.library import TYPES, library, matrices, row_table, sides
from kvcompile.kernels.transform import Transform


class _Cut(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("sequence", "head", "token")),
        *((name, ctypes.c_void_p) for name in ("side", "rows", "matrices", "means", "tokens")),
        ("kept", ctypes.c_int64),
        *(
            (name, ctypes.c_int)
            for name in ("first", "count", "batch", "column", "type_in", "type", "threads", "dim")
        ),
    ]  # fmt: skip


def takes(new_keys: torch.Tensor, new_values: torch.Tensor) -> bool:
    """Whether `compact` can be done here with such keys and values."""
    return all(new.device.type == "cpu" and new.dtype in TYPES for new in (new_keys, new_values))


def compact(
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    transform: Transform | None,
) -> None:
    """See `compact.api`."""
    made, both, moved = library(), sides(keys, values, layout), matrices(transform, layout)
    assert made is not None
    for cls, token in zip(layout.classes, tokens, strict=True):
        token = token.contiguous()
        for new, stored, side, name, first in (
            (new_keys, keys, both.keys, "k_codec", 0), (new_values, values, both.values, "v_codec", 3),
        ):  # fmt: skip
            new = new if new.stride(3) == 1 else new.contiguous()
            call = _Cut(
                new.data_ptr(), new.stride(0), new.stride(1), new.stride(2), ctypes.addressof(side),
                row_table(layout).data_ptr(), moved.pointers[first], moved.pointers[first + 2],
                token.data_ptr(), token.shape[2],
                cls.start, cls.count, len(token), COLUMNS.index(name), TYPES[new.dtype], TYPES[stored.exact.dtype],
                torch.get_num_threads(), stored.head_dim,
            )  # fmt: skip
            made.kvc_compact(ctypes.byref(call))
