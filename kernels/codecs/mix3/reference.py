"""What mix3 is, one vector at a time."""

from __future__ import annotations

import torch

from kvcompile.kernels.codecs.integers import reference as integers
from kvcompile.kernels.codecs.mix3 import CODEC


def encode(vector: torch.Tensor) -> tuple[list[int], list[float]]:
    """Bytes and scales of one vector [D]."""
    return integers.encode(vector, CODEC)


def decode(codes: list[int], scales: list[float]) -> list[float]:
    """The vector that bytes and scales stand for."""
    return integers.decode(codes, scales, CODEC)
