"""TurboQuant in torch, for any number of bits."""

from __future__ import annotations

from functools import cache

import torch

from kvcompile.evaluation.codecs.turboquant import PACK
from kvcompile.evaluation.codecs.turboquant.tables import codebook, rotation

HUGE = torch.finfo(torch.float16).max


def encode(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `codecs.api.encode`. The one scale is the vector's norm over that of its levels, by which the levels have to
    be multiplied to have the vector's norm."""
    turn, levels, edges = _tables(vectors.shape[-1], bits, vectors.device)
    rows = vectors.float()
    norm = rows.norm(dim=-1, keepdim=True)
    # A vector of zeros has no direction; with the scale 0 any codes stand for it.
    codes = torch.bucketize(rows / norm.clamp_min(torch.finfo(torch.float32).tiny) @ turn.mT, edges)
    scale = norm / levels[codes].norm(dim=-1, keepdim=True)
    return pack(codes, bits), scale.clamp_max(HUGE).half()


def decode(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """See `codecs.api.decode`."""
    turn, levels, _ = _tables(codes.shape[-1] * 8 // bits, bits, codes.device)
    return (levels[unpack(codes, bits)] * scales.float() @ turn).to(dtype)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes uint8 [..., D bits / 8] of codes int64 [..., D]: of 8 neighbours the first has the lowest bits."""
    shifts = torch.arange(PACK, device=codes.device)
    groups = codes.view(*codes.shape[:-1], codes.shape[-1] // PACK, PACK)
    words = (groups << bits * shifts).sum(-1, keepdim=True)
    return (words >> 8 * shifts[:bits] & 255).flatten(-2).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes that `pack` has packed."""
    shifts = torch.arange(PACK, device=packed.device)
    groups = packed.long().view(*packed.shape[:-1], packed.shape[-1] // bits, bits)
    words = (groups << 8 * shifts[:bits]).sum(-1, keepdim=True)
    return (words >> bits * shifts & (1 << bits) - 1).flatten(-2)


@cache
def _tables(size: int, bits: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotation [D, D], levels [2^bits] and the edges between them, float32."""
    levels = codebook(size, bits)
    # Outside of inference mode, as they are used again in any.
    with torch.inference_mode(False):
        tables = (rotation(size), levels, (levels[1:] + levels[:-1]) / 2)
        turn, means, edges = (torch.tensor(table, dtype=torch.float32, device=device) for table in tables)
    return turn, means, edges
