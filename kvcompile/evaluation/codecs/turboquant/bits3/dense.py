"""TurboQuant with 3 bits in torch."""

from __future__ import annotations

import torch

from kvcompile.evaluation.codecs.turboquant import dense
from kvcompile.evaluation.codecs.turboquant.bits3 import CODEC


def encode(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `codecs.api.encode`."""
    return dense.encode(vectors, CODEC.bits)


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `codecs.api.decode`."""
    return dense.decode(codes, scales, CODEC.bits, dtype)


def logits(query: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """See `codecs.api.logits`."""
    dense.logits(query, codes, scales, out, CODEC.bits)


def accumulate(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """See `codecs.api.accumulate`."""
    dense.accumulate(weights, codes, scales, out, CODEC.bits)
