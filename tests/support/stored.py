"""What two implementations have stored, or read."""

from __future__ import annotations

import torch

from kvcompile.kernels import Buffers, HeadClass, decode
from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import EXACT


def reads_alike(one: torch.Tensor, other: torch.Tensor, bits: int) -> torch.Tensor:
    """Elements [..., D] of which two implementations of a codec that encode the same vector may have one and the other.

    Sums that are made in another order may give a scale's neighbour; and of two steps between codes that are as good,
    each may take another one. By how scales are chosen, equal angles to the vector have equal norms.
    """
    alike = (one - other).abs() <= 2**-10 * other.abs()
    for group in codec_of(bits).split(one.shape[-1]):
        part = ..., slice(group.start, group.start + group.size)
        norm, expected = one[part].norm(dim=-1, keepdim=True), other[part].norm(dim=-1, keepdim=True)
        alike[part] |= (norm - expected).abs() <= 2**-9 * expected
    return alike


def assert_reads_alike(
    one: Buffers, other: Buffers, cls: HeadClass, tokens: slice = slice(None), moved: bool = True
) -> None:
    """The heads of a class read alike. Vectors that a transform has `moved` may differ a little before they are stored:
    a code may then be the neighbouring one."""
    bits = one.places[cls.start].codec
    ours, theirs = ([view[..., tokens, :] for view in buffers.views(cls)] for buffers in (one, other))
    if bits == EXACT:
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        return
    if not ours[0].numel():
        return
    read, expected = (decode(*views, bits, torch.float32) for views in (ours, theirs))
    if not moved:
        assert reads_alike(read, expected, bits).all()
        return
    step = torch.zeros_like(read)
    for i, group in enumerate(codec_of(bits).split(one.head_dim)):
        step[..., group.start : group.start + group.size] = theirs[1][..., i, None].float()
    differ = (read - expected).abs()
    alike = (differ <= 0.02 * step + 1e-6) | reads_alike(read, expected, bits)
    assert (~alike).float().mean() < 0.05
    # Both are codes of the same vector.
    assert (differ.norm(dim=-1) <= 0.6 * expected.norm(dim=-1) + step.norm(dim=-1) + 1e-6).all()
