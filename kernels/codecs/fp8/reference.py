"""What fp8 is, one vector at a time."""

from __future__ import annotations

import torch

from kvcompile.kernels.codecs.fp8 import CODEC, LARGEST


def number(code: int) -> float:
    """What a byte stands for: sign, 4 bits of exponent with a bias of 7, 3 bits of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


def nearest(x: float) -> int:
    """The byte of the nearest number; of two as near, that with the even code. 0 keeps no sign."""
    code = min(range(127), key=lambda c: (abs(number(c) - abs(x)), c & 1))
    return code | 128 if x < 0 and code else code


def encode(vector: torch.Tensor) -> tuple[list[int], list[float]]:
    """Bytes and scales of one vector [D]."""
    codes: list[int] = []
    scales: list[float] = []
    for part in vector.double().chunk(CODEC.groups(len(vector))):
        largest = max(abs(float(x)) for x in part)
        scale = torch.tensor(largest / LARGEST, dtype=torch.float32).clamp(min=2.0**-14, max=65504).half().item()
        scales.append(scale)
        codes += [nearest(min(max(float(x) / scale, -LARGEST), LARGEST)) for x in part]
    return codes, scales


def decode(codes: list[int], scales: list[float]) -> list[float]:
    """The vector that bytes and scales stand for."""
    size = len(codes) // len(scales)
    return [number(code) * scales[i // size] for i, code in enumerate(codes)]
