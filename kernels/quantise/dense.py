"""`encode` and `decode` in torch."""

from __future__ import annotations

import torch

TINY = torch.finfo(torch.float16).tiny


def encode(vectors: torch.Tensor, bits: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `api.encode`."""
    half = 2 ** (bits - 1)
    parts = vectors.float().unflatten(-1, (groups, -1))
    scale = (parts.abs().amax(-1) / half).clamp(TINY, torch.finfo(torch.float16).max).half()
    code = (parts / scale.float().unsqueeze(-1)).floor_().clamp_(-half, half - 1).add_(half)
    packed = code.flatten(-2).to(torch.uint8)
    if bits == 4:
        packed = packed[..., 0::2] | (packed[..., 1::2] << 4)
    return packed, scale


def decode(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """See `api.decode`."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    centred = codes.float() - (2 ** (bits - 1) - 0.5)
    parts = centred.unflatten(-1, (scales.shape[-1], -1)) * scales.float().unsqueeze(-1)
    return parts.flatten(-2).to(dtype)
