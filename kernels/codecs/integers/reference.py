"""Codes and scales of one vector in plain Python."""

from __future__ import annotations

import math

import torch

from kvcompile.kernels.codecs.base import Codec
from kvcompile.kernels.codecs.integers import LESS, keeps_norm, steps

TINY, HUGE = 2.0**-14, 65504.0


def encode(vector: torch.Tensor, codec: Codec) -> tuple[list[int], list[float]]:
    """Bytes of a vector [D], and a scale for every group."""
    stored: list[int] = []
    scales: list[float] = []
    for bits, start, size, _ in codec.split(len(vector)):
        part = vector.float()[start : start + size].tolist()
        codes, scale = _rounded(part, bits, keeps_norm(codec.sections))
        scales.append(torch.tensor(scale, dtype=torch.float32).clamp(min=TINY, max=HUGE).half().item())
        stored += packed(codes, bits)
    return stored, scales


def _rounded(group: list[float], bits: int, norm: bool) -> tuple[list[int], float]:
    """Codes from 0 on, and the scale before it is rounded."""
    half = 2 ** (bits - 1)
    most = min(max(max(abs(x) for x in group), half * TINY), half * HUGE)
    units = [_unit(x, most) for x in group]
    best: tuple[float, list[int], float, float] | None = None
    for i, step in enumerate(steps(bits)):
        codes = [min(max(_floor(unit, half / step), -half), half - 1) for unit in units]
        along = sum((code + 0.5) * unit for code, unit in zip(codes, units, strict=True))
        square = sum((code + 0.5) ** 2 for code in codes)
        worth = along**2 * (1 - LESS * i) / square
        if best is None or worth > best[0]:
            best = worth, codes, along, square
    assert best is not None
    _, codes, along, square = best
    own = sum(unit * unit for unit in units)
    return [code + half for code in codes], most * (math.sqrt(own / square) if norm else own / max(along, TINY))


# Rounded to float32 as everywhere: at the edge of two codes something more precise would fall on the other side.
def _unit(x: float, most: float) -> float:
    return (torch.tensor(x, dtype=torch.float32) / torch.tensor(most, dtype=torch.float32)).clamp(-1, 1).item()


def _floor(unit: float, rate: float) -> int:
    return math.floor((torch.tensor(unit, dtype=torch.float32) * rate).item())


def decode(stored: list[int], scales: list[float], codec: Codec) -> list[float]:
    """The vector that bytes and scales stand for."""
    found: list[float] = [0.0] * codec.elements(len(stored))  # what has no codes reads as 0
    for scale, (bits, start, size, byte) in zip(scales, codec.split(len(found)), strict=True):
        codes = unpacked(stored[byte : byte + size * bits // 8], bits)
        found[start : start + size] = [(code - 2 ** (bits - 1) + 0.5) * scale for code in codes]
    return found


def packed(codes: list[int], bits: int) -> list[int]:
    """Bytes of a group's codes."""
    if bits == 3:
        low, n = packed([code & 3 for code in codes], 2), len(codes) // 8
        high = [sum((codes[4 * i + j] >> 2) << j for j in range(4)) for i in range(2 * n)]
        return low + [high[i] | high[i + n] << 4 for i in range(n)]
    per = 8 // bits
    return [sum(codes[per * i + j] << bits * j for j in range(per)) for i in range(len(codes) // per)]


def unpacked(stored: list[int], bits: int) -> list[int]:
    """The codes in a group's bytes."""
    if bits == 3:
        n = len(stored) // 3
        low, high = unpacked(stored[: 2 * n], 2), stored[2 * n :]
        return [low[e] | (high[e // 4 % n] >> (4 * (e // 4 // n) + e % 4) & 1) << 2 for e in range(8 * n)]
    return [byte >> bits * j & 2**bits - 1 for byte in stored for j in range(8 // bits)]
