"""Codes and scales of one vector in plain Python."""

from __future__ import annotations

import math

import torch

from kvcompile.kernels.codecs.base import Codec


def encode(vector: torch.Tensor, codec: Codec) -> tuple[list[int], list[float]]:
    """Bytes of a vector [D], and a scale for every group."""
    stored: list[int] = []
    scales: list[float] = []
    for bits, start, size, _ in codec.split(len(vector)):
        half, part = 2 ** (bits - 1), vector.double()[start : start + size]
        largest = max(abs(float(x)) for x in part)
        scale = torch.tensor(largest / half, dtype=torch.float32).clamp(min=2.0**-14, max=65504).half().item()
        scales.append(scale)
        stored += packed([min(max(math.floor(float(x) / scale), -half), half - 1) + half for x in part], bits)
    return stored, scales


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
