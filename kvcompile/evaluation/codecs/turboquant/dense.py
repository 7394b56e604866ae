"""TurboQuant in torch, for any number of bits."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from kvcompile.evaluation.codecs.turboquant import PACK
from kvcompile.evaluation.codecs.turboquant.tables import codebook, rotation
from kvcompile.kernels.blocks import ranges

HUGE = torch.finfo(torch.float16).max


def encode(vectors: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `codecs.api.encode`. The one scale is the vector's norm over that of its levels, by which the levels have to
    be multiplied to have the vector's norm."""
    tables = _tables(vectors.shape[-1], bits, vectors.device)
    rows = vectors.float()
    norm = rows.norm(dim=-1, keepdim=True)
    # A vector of zeros has no direction; with the scale 0 any codes stand for it.
    codes = torch.bucketize(rows / norm.clamp_min(torch.finfo(torch.float32).tiny) @ tables.turn.mT, tables.edges)
    scale = norm / tables.levels[codes].norm(dim=-1, keepdim=True)
    return pack(codes, bits), scale.clamp_max(HUGE).half()


def decode(codes: torch.Tensor, scales: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """See `codecs.api.decode`."""
    turn = _tables(codes.shape[-1] * PACK // bits, bits, codes.device).turn
    return (unpack(codes, bits) * scales.float() @ turn).to(dtype)


def logits(query: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, bits: int) -> None:
    """See `codecs.api.logits`: queries are rotated, and what is stored is met as it is."""
    turned = query @ _tables(query.shape[-1], bits, codes.device).turn.mT
    for start, stop, block in ranges(codes):
        torch.bmm(turned, unpack(block, bits).mT, out=out[:, :, start:stop])
    out.mul_(scales.mT)


def accumulate(weights: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, bits: int) -> None:
    """See `codecs.api.accumulate`: the sum is rotated back, and not the vectors."""
    weights, found = weights * scales.mT, torch.zeros_like(out)
    for start, stop, block in ranges(codes):
        found.baddbmm_(weights[:, :, start:stop], unpack(block, bits))
    out += found @ _tables(out.shape[-1], bits, codes.device).turn


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes uint8 [..., D bits / 8] of codes int64 [..., D]: of 8 neighbours the first has the lowest bits."""
    shifts = torch.arange(PACK, device=codes.device)
    groups = codes.view(*codes.shape[:-1], codes.shape[-1] // PACK, PACK)
    words = (groups << bits * shifts).sum(-1, keepdim=True)
    return (words >> 8 * shifts[:bits] & 255).flatten(-2).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The levels f32 [..., D] of codes that `pack` has packed, looked up several at a time: two to a byte, or of 3 bits
    four to a byte and a half."""
    size, words = packed.shape[-1] * PACK // bits, packed.int()
    if bits % 2:
        first, middle, last = (words[..., byte::3] for byte in range(3))
        words = torch.stack([first | (middle & 15) << 8, middle >> 4 | last << 4], -1).flatten(-2)
    several = _tables(size, bits, packed.device).several
    return several.index_select(0, words.flatten()).view(*packed.shape[:-1], size)


class _Tables(NamedTuple):
    """The rotation [D, D], levels [2^bits] and the edges between them, and the levels of several codes by the bits of
    all of them, [2^8, 2] or [2^12, 4]; float32."""

    turn: torch.Tensor
    levels: torch.Tensor
    edges: torch.Tensor
    several: torch.Tensor


@cache
def _tables(size: int, bits: int, device: torch.device) -> _Tables:
    levels = codebook(size, bits)
    # Outside of inference mode, as they are used again in any.
    with torch.inference_mode(False):
        tables = (rotation(size), levels, (levels[1:] + levels[:-1]) / 2)
        turn, means, edges = (torch.tensor(table, dtype=torch.float32, device=device) for table in tables)
        count = 4 if bits % 2 else 2
        codes = torch.arange(1 << bits * count, device=device)[:, None] >> bits * torch.arange(count, device=device)
        several = means[codes & (1 << bits) - 1]
    return _Tables(turn, means, edges, several)
