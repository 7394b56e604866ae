"""What rounding to 4 or 8 bits is, one vector at a time."""

from __future__ import annotations

import math

import torch

from kvcompile.kernels.quantise.api import groups


def encode(vector: torch.Tensor, bits: int) -> tuple[list[int], list[float]]:
    """Bytes and scales of one vector [D]."""
    half = 2 ** (bits - 1)
    codes: list[int] = []
    scales: list[float] = []
    for part in vector.double().chunk(groups(len(vector))):
        largest = max(abs(float(x)) for x in part)
        scale = torch.tensor(largest / half, dtype=torch.float32).clamp(min=2.0**-14, max=65504).half().item()
        scales.append(scale)
        codes += [min(max(math.floor(float(x) / scale), -half), half - 1) + half for x in part]
    if bits == 4:
        codes = [low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)]
    return codes, scales


def decode(codes: list[int], scales: list[float], bits: int) -> list[float]:
    """The vector that bytes and scales stand for."""
    if bits == 4:
        codes = [code for byte in codes for code in (byte & 15, byte >> 4)]
    size = len(codes) // len(scales)
    return [(code - 2 ** (bits - 1) + 0.5) * scales[i // size] for i, code in enumerate(codes)]
