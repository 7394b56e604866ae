"""int8 in torch."""

from __future__ import annotations

import torch

from kvcompile.kernels.blocks import blocks
from kvcompile.kernels.codecs.int8 import CODEC
from kvcompile.kernels.codecs.integers import dense as integers


def encode(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `codecs.api.encode`."""
    return integers.encode(vectors, CODEC)


def decode(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See `codecs.api.decode`."""
    return integers.decode(codes, scales, CODEC, dtype)


def read_back(vectors: torch.Tensor) -> torch.Tensor:
    """See `read_back.api`."""
    return integers.read_back(vectors, CODEC)


def logits(query: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """See `codecs.api.logits`."""
    integers.logits(query, codes, scales, out, CODEC, _multiply)


def accumulate(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """See `codecs.api.accumulate`."""
    integers.accumulate(weights, codes, scales, out, CODEC, _add)


def _multiply(asked: torch.Tensor, codes: torch.Tensor, into: torch.Tensor) -> None:
    for start, stop, block in blocks(codes):
        torch.bmm(asked, block.mT, out=into[:, :, start:stop])


def _add(weights: torch.Tensor, codes: torch.Tensor, into: torch.Tensor) -> None:
    for start, stop, block in blocks(codes):
        into += weights[:, :, start:stop] @ block
