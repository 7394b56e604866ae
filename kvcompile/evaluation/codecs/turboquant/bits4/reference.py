"""What TurboQuant with 4 bits is, one vector at a time."""

from __future__ import annotations

import torch

from kvcompile.evaluation.codecs.turboquant import reference
from kvcompile.evaluation.codecs.turboquant.bits4 import CODEC


def encode(vector: torch.Tensor) -> tuple[list[int], list[float]]:
    """Bytes and the scale of one vector [D]."""
    return reference.encode(vector, CODEC.bits)


def decode(codes: list[int], scales: list[float]) -> list[float]:
    """The vector that bytes and scale stand for."""
    return reference.decode(codes, scales, CODEC.bits)
