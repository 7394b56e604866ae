"""What int4 is, one vector at a time."""

from __future__ import annotations

import torch

from kvcompile.kernels.codecs.int4 import CODEC
from kvcompile.kernels.codecs.integers import reference as integers


def encode(vector: torch.Tensor) -> tuple[list[int], list[float]]:
    """Bytes and scales of one vector [D]."""
    codes, scales = integers.encode(vector, CODEC)
    return [low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)], scales


def decode(codes: list[int], scales: list[float]) -> list[float]:
    """The vector that bytes and scales stand for."""
    return integers.decode([code for byte in codes for code in (byte & 15, byte >> 4)], scales, CODEC)
