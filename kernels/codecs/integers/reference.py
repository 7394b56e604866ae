"""Codes and scales of one vector in plain Python."""

from __future__ import annotations

import math

import torch

from kvcompile.kernels.codecs.base import Codec


def encode(vector: torch.Tensor, codec: Codec) -> tuple[list[int], list[float]]:
    """A code for every element of a vector [D], from 0 to 2^bits - 1, and a scale for every group."""
    half = 2 ** (codec.bits - 1)
    codes: list[int] = []
    scales: list[float] = []
    for part in vector.double().chunk(codec.groups(len(vector))):
        largest = max(abs(float(x)) for x in part)
        scale = torch.tensor(largest / half, dtype=torch.float32).clamp(min=2.0**-14, max=65504).half().item()
        scales.append(scale)
        codes += [min(max(math.floor(float(x) / scale), -half), half - 1) + half for x in part]
    return codes, scales


def decode(codes: list[int], scales: list[float], codec: Codec) -> list[float]:
    """The vector that codes, one an element, and scales stand for."""
    size = len(codes) // len(scales)
    return [(code - 2 ** (codec.bits - 1) + 0.5) * scales[i // size] for i, code in enumerate(codes)]
