"""fp8 in torch."""

from __future__ import annotations

import torch

from kvcompile.kernels.codecs.fp8 import CODEC, LARGEST

TINY, HUGE = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max


def encode(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `codecs.api.encode`."""
    parts = vectors.float().unflatten(-1, (CODEC.groups(vectors.shape[-1]), -1))
    scale = (parts.abs().amax(-1) / LARGEST).clamp(TINY, HUGE).half()
    # Where the scale is as large as float16 holds, elements are past the format's last number: some versions of torch
    # then convert to NaN, others to that number. Adding 0 makes -0 to 0, so that a code stands for one number.
    scaled = (parts / scale.float().unsqueeze(-1)).clamp(-LARGEST, LARGEST)
    codes = (scaled.to(torch.float8_e4m3fn).float() + 0.0).to(torch.float8_e4m3fn)
    return codes.flatten(-2).view(torch.uint8), scale


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `codecs.api.decode`."""
    numbers = codes.contiguous().view(torch.float8_e4m3fn).float()
    parts = numbers.unflatten(-1, (scales.shape[-1], -1)) * scales.float().unsqueeze(-1)
    return parts.flatten(-2).to(dtype)
