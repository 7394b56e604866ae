"""Reading vectors back in C, without storing them: the launcher of `back.h`."""

from __future__ import annotations

import ctypes
import os

import torch

from kvcompile.kernels.codecs.base import Codec
from kvcompile.kernels.dispatch import CHOICE
from kvcompile.kernels.native.library import MOST_DIM, at, library


def takes(vectors: torch.Tensor, codec: Codec) -> bool:
    """Whether `read_back` can be done here."""
    return (
        vectors.device.type == "cpu"
        and vectors.shape[-1] <= MOST_DIM
        and codec.has("native")
        and os.environ.get(CHOICE, "") == ""
        and library() is not None
    )


def read_back(vectors: torch.Tensor, codec: Codec) -> torch.Tensor:
    """See `read_back.api`."""
    made, vectors = library(), vectors.float().contiguous()
    assert made is not None
    out, head_dim = torch.empty_like(vectors), vectors.shape[-1]
    rows = ctypes.c_int64(vectors.numel() // head_dim)
    made.kvc_read_back(at(vectors), at(out), rows, codec.id, head_dim, torch.get_num_threads())
    return out
