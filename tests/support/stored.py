"""Stores that two implementations have filled."""

from __future__ import annotations

import torch

from kvcompile.kernels import Buffers, HeadClass, decode
from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import EXACT


def assert_reads_alike(one: Buffers, other: Buffers, cls: HeadClass, tokens: slice = slice(None)) -> None:
    """The heads of a class read alike. Sums may be made in another order, so that a code may be the neighbouring one, a
    scale off by its last bit, and where two steps are as good, another one chosen."""
    codec = one.places[cls.start].codec
    ours, theirs = ([view[..., tokens, :] for view in buffers.views(cls)] for buffers in (one, other))
    if codec == EXACT:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        return
    if not ours[0].numel():
        return
    read, expected = (decode(*views, codec, torch.float32) for views in (ours, theirs))
    step = torch.zeros_like(read)
    for i, group in enumerate(codec_of(codec).split(one.head_dim)):
        step[..., group.start : group.start + group.size] = theirs[1][..., i, None].float()
    differ = (read - expected).abs()
    assert (differ > 0.02 * step + 1e-6).float().mean() < 0.05
    # Both are codes of the same vector.
    assert (differ.norm(dim=-1) <= 0.6 * expected.norm(dim=-1) + step.norm(dim=-1) + 1e-6).all()
