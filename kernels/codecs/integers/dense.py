"""Codes and scales in torch, and the products with them that a decode step needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kvcompile.kernels.codecs.base import Codec
from kvcompile.kernels.codecs.integers import LESS, keeps_norm, steps
from kvcompile.kernels.codecs.integers.packing import pack, unpack
from kvcompile.kernels.codecs.integers.stretches import stretches

TINY, HUGE = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with the query's part [B, Hq, D / groups] of a group, the group's packed codes [B, n, X], and where to put
their products [B, Hq, n]."""

Accumulate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with weights [B, Hq, n], a group's packed codes [B, n, X], and what [B, Hq, D / groups] to add their weighted
sum to."""


def encode(vectors: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., code bytes] and scales float16 [..., groups] of `vectors` [..., D]."""
    vectors, codes, scales = vectors.float(), [], []
    for bits, level, scale in _rounded(codec, vectors):
        codes.append(pack(level.add_(centre(bits)).to(torch.uint8), bits).flatten(-2))
        scales.append(scale)
    return (codes[0], scales[0]) if len(codes) == 1 else (torch.cat(codes, dim=-1), torch.cat(scales, dim=-1))


def decode(codes: torch.Tensor, scales: torch.Tensor, codec: Codec, dtype: torch.dtype) -> torch.Tensor:
    """Vectors [..., D] of `dtype` from codes [..., code bytes] and scales [..., groups]."""
    head_dim = codec.elements(codes.shape[-1])
    found: list[torch.Tensor] = []
    first = 0
    for group in stretches(codec, head_dim):
        stored = codes[..., group.byte : group.byte + group.count * group.size * group.bits // 8]
        centred = unpack(stored.unflatten(-1, (group.count, -1)), group.bits).float() - centre(group.bits)
        scale = scales[..., first : first + group.count].float().unsqueeze(-1)
        found.append((centred * scale).flatten(-2).to(dtype))
        first += group.count
    return _whole(found, head_dim)


def read_back(vectors: torch.Tensor, codec: Codec) -> torch.Tensor:
    """What `vectors` [..., D] read as once they have been stored, float32, without packing them."""
    parts = [
        level.mul_(scale.float().unsqueeze(-1)).flatten(-2) for _, level, scale in _rounded(codec, vectors.float())
    ]
    return _whole(parts, vectors.shape[-1])


def _rounded(codec: Codec, vectors: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Of every stretch of `vectors` f32 [..., D]: bits, levels f32 [..., count, size], which are codes from
    -2^(bits-1) on and 1/2, and scales float16 [..., count]."""
    for group in stretches(codec, vectors.shape[-1]):
        part = vectors[..., group.start : group.start + group.count * group.size]
        part, half = part.unflatten(-1, (group.count, group.size)), 2 ** (group.bits - 1)
        most = part.abs().amax(-1, keepdim=True).clamp_(half * TINY, half * HUGE)
        unit = (part / most).clamp_(-1, 1)
        level, along, square = _levels(unit, group.bits)
        own = unit.square().sum(-1, keepdim=True)
        scale = most * ((own / square).sqrt() if keeps_norm(codec.sections) else own / along.clamp_min(TINY))
        yield group.bits, level, scale.clamp_(TINY, HUGE).half().squeeze(-1)


def _levels(unit: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels f32 [..., size] of groups `unit` f32 [..., size] whose largest magnitude is 1, their product with the
    group, and with themselves, [..., 1]: those with the largest cosine."""
    half = 2 ** (bits - 1)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for i, step in enumerate(steps(bits)):
        level = (unit * (half / step)).floor_().clamp_(-half, half - 1).add_(0.5)
        found = level, (level * unit).sum(-1, keepdim=True), level.square().sum(-1, keepdim=True)
        worth = found[1].square().mul_(1 - LESS * i) / found[2]
        if best is None:
            best, most = found, worth
            continue
        better = worth > most
        level, along, square = (torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        best, most = (level, along, square), torch.maximum(worth, most)
    assert best is not None
    return best


def _whole(parts: list[torch.Tensor], head_dim: int) -> torch.Tensor:
    """Vectors [..., D] from their parts, with zeros in the place of what is not stored."""
    if (dropped := head_dim - sum(part.shape[-1] for part in parts)) > 0:
        parts = [*parts, parts[0].new_zeros(*parts[0].shape[:-1], dropped)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def centre(bits: int) -> float:
    """What a stored code has to be lowered by: 2^(bits-1) was added to it, and it reads half a step higher."""
    return 2 ** (bits - 1) - 0.5


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
        into -= centre(codec.bits) * asked.sum(2, keepdim=True)
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
        into -= centre(codec.bits) * scaled.sum(2, keepdim=True)
        add(scaled, codes.chunk(groups, 2)[g], into)
