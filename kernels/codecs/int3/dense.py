"""int3 in torch."""

from __future__ import annotations

import torch

from kvcompile.kernels.codecs.int3 import CODEC
from kvcompile.kernels.codecs.integers import dense as integers


def encode(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `codecs.api.encode`."""
    return integers.encode(vectors, CODEC)


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `codecs.api.decode`."""
    return integers.decode(codes, scales, CODEC, dtype)


def read_back(vectors: torch.Tensor) -> torch.Tensor:
    """See `read_back.api`."""
    return integers.read_back(vectors, CODEC)
