"""Codes and scales in torch, and the products with them that a decode step needs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvcompile.kernels.codecs.base import Codec

TINY, HUGE = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with the query's part [B, Hq, D / groups] of a group, the group's packed codes [B, n, X], and where to put
their products [B, Hq, n]."""

Accumulate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with weights [B, Hq, n], a group's packed codes [B, n, X], and what [B, Hq, D / groups] to add their weighted
sum to."""


def encode(vectors: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """A code uint8 [..., D] for every element of `vectors` [..., D], and scales float16 [..., groups]."""
    half = 2 ** (codec.bits - 1)
    parts = vectors.float().unflatten(-1, (codec.groups(vectors.shape[-1]), -1))
    scale = (parts.abs().amax(-1) / half).clamp(TINY, HUGE).half()
    code = (parts / scale.float().unsqueeze(-1)).floor_().clamp_(-half, half - 1).add_(half)
    return code.flatten(-2).to(torch.uint8), scale


def decode(codes: torch.Tensor, scales: torch.Tensor, codec: Codec, dtype: torch.dtype) -> torch.Tensor:
    """Vectors [..., D] of `dtype` from codes [..., D], one an element, and scales [..., groups]."""
    centred = codes.float() - centre(codec)
    parts = centred.unflatten(-1, (scales.shape[-1], -1)) * scales.float().unsqueeze(-1)
    return parts.flatten(-2).to(dtype)


def centre(codec: Codec) -> float:
    """What a stored code has to be lowered by: 2^(bits-1) was added to it, and it reads half a step higher."""
    return 2 ** (codec.bits - 1) - 0.5


def logits(
    query: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, codec: Codec, multiply: Multiply
) -> None:
    """Products of `query` f32 [B, Hq, D] with the vectors of `codes` [B, n, X] and `scales` [B, n, groups], into `out`
    [B, Hq, n].

    With q, c and s of one group, q . ((c - centre) s) = (q . c - centre sum(q)) s: codes are multiplied as they are,
    and centre and scale are applied to the products, of which there are D times fewer.
    """
    scales, groups = scales.float(), scales.shape[2]
    for g, asked in enumerate(query.chunk(groups, 2)):
        part, into = codes.chunk(groups, 2)[g], out if groups == 1 else torch.empty_like(out)
        multiply(asked, part, into)
        into -= centre(codec) * asked.sum(2, keepdim=True)
        into *= scales[:, None, :, g]
        if groups > 1:
            out.copy_(into) if g == 0 else out.add_(into)


def accumulate(
    weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, codec: Codec, add: Accumulate
) -> None:
    """Add the vectors of `codes` [B, n, X] and `scales` [B, n, groups], weighted with f32 [B, Hq, n], to `out` f32
    [B, Hq, D].

    With weights w and c and s of one group, sum(w (c - centre) s) = sum((w s) c) - centre sum(w s).
    """
    scales, groups = scales.float(), scales.shape[2]
    for g, into in enumerate(out.chunk(groups, 2)):
        scaled = weights * scales[:, None, :, g]
        into -= centre(codec) * scaled.sum(2, keepdim=True)
        add(scaled, codes.chunk(groups, 2)[g], into)
