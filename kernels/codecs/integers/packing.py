"""Codes of 8, 4, 3 and 2 bits in bytes, in torch.

8 / b neighbouring codes of b = 4 or 2 bits share a byte, the first in its lowest bits. Codes of 3 bits are two parts:
first the low two bits of all elements, as codes of 2 bits; then the high ones, a byte for eight elements. With n bytes
in the first part, byte i of the second has the high bits of the four elements of byte i in its low half, and those of
the four of byte i + n / 2 in its high half, so that no lane of a vector unit looks at its neighbours.
"""

from __future__ import annotations

import torch


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes uint8 [..., n bits / 8] of codes uint8 [..., n]."""
    if bits == 8:
        return codes
    if bits == 3:
        high = codes >> 2
        nibbles = high[..., 0::4] | high[..., 1::4] << 1 | high[..., 2::4] << 2 | high[..., 3::4] << 3
        first, second = nibbles.chunk(2, dim=-1)
        return torch.cat([pack(codes & 3, 2), first | second << 4], dim=-1)
    per = 8 // bits
    packed = codes[..., 0::per].clone()
    for i in range(1, per):
        packed |= codes[..., i::per] << bits * i
    return packed


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [..., n] of bytes uint8 [..., n bits / 8]."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = packed.split([packed.shape[-1] * 2 // 3, packed.shape[-1] // 3], dim=-1)
        nibbles = torch.cat([high & 15, high >> 4], dim=-1)
        return unpack(low, 2) | torch.stack([nibbles >> i & 1 for i in range(4)], dim=-1).flatten(-2) << 2
    mask = 2**bits - 1
    return torch.stack([packed >> bits * i & mask for i in range(8 // bits)], dim=-1).flatten(-2)
