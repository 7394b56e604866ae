"""Quantising keys and values and reading them back, for any codec: the checked entry point."""

from __future__ import annotations

import torch

from kvcompile.kernels.blocks import ranges
from kvcompile.kernels.codecs import CODECS, Codec, codec_of


def encode(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., code bytes] and scales float16 [..., groups] of `vectors` [..., D] of any float type, in the
    codec whose id is `bits`.

    Raises:
        ValueError: bits of no codec, or a size that does not split into the codec's groups.
    """
    codes, scales = checked(vectors.shape[-1], bits).load("dense").encode(vectors)
    return codes, scales


def decode(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Vectors [..., D] of `dtype` that codes and scales of the codec whose id is `bits` stand for.

    Raises:
        ValueError: bits of no codec, or codes and scales that do not fit each other.
    """
    size = CODECS[bits].elements(codes.shape[-1]) if bits in CODECS else 0
    codec = checked(size, bits)
    if scales.shape != (*codes.shape[:-1], codec.groups(size)):
        raise ValueError(f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)} do not fit")
    vectors: torch.Tensor = codec.load("dense").decode(codes, scales, dtype)
    return vectors


def logits(query: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Products of `query` f32 [B, Hq, D] with the vectors of `codes` [B, n, X] and `scales` [B, n, groups], into `out`
    [B, Hq, n]. A codec whose `dense` has no way of its own is decoded a block at a time."""
    dense = codec_of(bits).load("dense")
    if hasattr(dense, "logits"):
        dense.logits(query, codes, scales, out)
        return
    for start, stop, block in ranges(codes):
        vectors = dense.decode(block, scales[:, start:stop], torch.float32)
        torch.bmm(query, vectors.mT, out=out[:, :, start:stop])


def accumulate(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Add the vectors of `codes` [B, n, X] and `scales` [B, n, groups], weighted with f32 [B, Hq, n], to `out` f32
    [B, Hq, D]; decoded as in `logits`."""
    dense = codec_of(bits).load("dense")
    if hasattr(dense, "accumulate"):
        dense.accumulate(weights, codes, scales, out)
        return
    for start, stop, block in ranges(codes):
        out.baddbmm_(weights[:, :, start:stop], dense.decode(block, scales[:, start:stop], torch.float32))


def checked(head_dim: int, bits: int) -> Codec:
    """The codec whose id is `bits`. Raises ValueError where it does not exist or cannot store so many elements."""
    codec = CODECS.get(bits)
    if codec is None or not codec.fits(head_dim):
        raise ValueError(f"{head_dim} elements cannot be stored in {bits} bits")
    return codec
