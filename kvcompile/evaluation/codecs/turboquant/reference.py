"""What TurboQuant is, one vector at a time, for any number of bits."""

from __future__ import annotations

import math

import torch

from kvcompile.evaluation.codecs.turboquant.tables import codebook, rotation


def encode(vector: torch.Tensor, bits: int) -> tuple[list[int], list[float]]:
    """Bytes and the one scale of a vector [D]."""
    x = [float(element) for element in vector]
    levels, norm = codebook(len(x), bits).tolist(), math.hypot(*x)
    codes = []
    for row in rotation(len(x)).tolist():
        turned = sum(a * b for a, b in zip(row, x, strict=True)) / norm if norm else 0.0
        codes.append(min(range(len(levels)), key=lambda code: abs(levels[code] - turned)))
    scale = torch.tensor(min(norm / math.hypot(*(levels[code] for code in codes)), 65504.0)).half().item()
    # All codes as the digits of one number, the first the lowest; its bytes, the lowest first.
    number = sum(code << bits * place for place, code in enumerate(codes))
    return list(number.to_bytes(len(x) * bits // 8, "little")), [scale]


def decode(packed: list[int], scales: list[float], bits: int) -> list[float]:
    """The vector that bytes and scale stand for."""
    number, size = int.from_bytes(bytes(packed), "little"), len(packed) * 8 // bits
    levels = codebook(size, bits).tolist()
    turned = [levels[number >> bits * place & (1 << bits) - 1] * scales[0] for place in range(size)]
    columns = rotation(size).T.tolist()
    return [sum(a * b for a, b in zip(column, turned, strict=True)) for column in columns]
