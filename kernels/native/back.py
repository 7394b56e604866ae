"""Reading vectors back in C, without storing them: the launcher of `back.c`."""

from __future__ import annotations

import ctypes
import os
from functools import cache

import torch

from kvcompile.kernels.codecs.base import Codec
from kvcompile.kernels.dispatch import CHOICE
from kvcompile.kernels.native import build
from kvcompile.kernels.native.library import CONSTANTS, FLAGS, MOST_DIM, at

SOURCE = build.Source.named("back", ("store", "codecs"), (*FLAGS, *CONSTANTS), "reading codes back")


def takes(vectors: torch.Tensor, codec: Codec) -> bool:
    """Whether `read_back` can be done here."""
    return (
        vectors.device.type == "cpu"
        and vectors.shape[-1] <= MOST_DIM
        and codec.has("native")
        and os.environ.get(CHOICE, "") == ""
        and _library() is not None
    )


@cache
def _library() -> ctypes.CDLL | None:
    return build.library(SOURCE)


def read_back(vectors: torch.Tensor, codec: Codec) -> torch.Tensor:
    """See `read_back.api`."""
    made, vectors = _library(), vectors.float().contiguous()
    assert made is not None
    out, head_dim = torch.empty_like(vectors), vectors.shape[-1]
    rows = ctypes.c_int64(vectors.numel() // head_dim)
    made.kvc_read_back(at(vectors), at(out), rows, codec.id, head_dim, torch.get_num_threads())
    return out
