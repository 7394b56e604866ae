"""int4 in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvcompile.kernels.blocks import ranges, scratch
from kvcompile.kernels.codecs.int4 import CODEC
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
    # Masking the low half out would be one more pass over the codes. As low = byte - 16 high, even low + odd high is
    # even byte + (odd - 16 even) high, with the query's even and odd elements.
    even, odd = asked[:, :, 0::2].contiguous(), asked[:, :, 1::2]
    odd = odd - 16 * even
    for start, stop, byte, high in _nibbles(codes):
        torch.bmm(even, byte.mT, out=into[:, :, start:stop])
        into[:, :, start:stop].baddbmm_(odd, high.mT)


def _add(weights: torch.Tensor, codes: torch.Tensor, into: torch.Tensor) -> None:
    for start, stop, byte, high in _nibbles(codes):
        odd = weights[:, :, start:stop] @ high
        into[:, :, 0::2] += (weights[:, :, start:stop] @ byte).sub_(odd, alpha=16)
        into[:, :, 1::2] += odd


def _nibbles(codes: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """Bytes [B, n, X] and their high halves as float32, some at a time: first, after the last, and both."""
    for start, stop, block in ranges(codes):
        high = torch.bitwise_right_shift(block, 4, out=scratch.get("high", block, torch.uint8))
        yield (
            start,
            stop,
            scratch.get("rows", block, torch.float32).copy_(block),
            scratch.get("halves", block, torch.float32).copy_(high),
        )
