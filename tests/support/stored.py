"""What two implementations have stored, or read."""

from __future__ import annotations

import torch

from kvcompile.kernels import Buffers, HeadClass, decode
from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.layout import EXACT


def reads_alike(one: torch.Tensor, other: torch.Tensor, bits: int) -> bool:
    """Whether two implementations of a codec that encode the same vectors may read as `one` and `other` [..., D].

    Sums that are made in another order may give a scale's neighbour. Of two steps between codes that are as good, each
    may take another one, which is rare: one group, or one in fifty, may differ so, and is then near the other.
    """
    close, groups, differ = (one - other).abs() <= 2**-10 * other.abs(), 0, 0
    for group in codec_of(bits).split(one.shape[-1]):
        part = ..., slice(group.start, group.start + group.size)
        apart = ~close[part].all(-1)
        groups, differ = groups + apart.numel(), differ + int(apart.sum())
        if (torch.cosine_similarity(one[part][apart], other[part][apart], dim=-1) < 0.75).any():
            return False
    return differ <= max(1, groups // 50)


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
        assert reads_alike(read, expected, bits)
        return
    step = torch.zeros_like(read)
    for i, group in enumerate(codec_of(bits).split(one.head_dim)):
        step[..., group.start : group.start + group.size] = theirs[1][..., i, None].float()
    differ = (read - expected).abs()
    # A code here and there, or a group of which another step was taken.
    largest = max(group.size for group in codec_of(bits).split(one.head_dim))
    assert (differ > 0.02 * step + 1e-6).sum() <= max(largest, 0.05 * differ.numel())
    # Both are codes of the same vector.
    assert (differ.norm(dim=-1) <= 0.6 * expected.norm(dim=-1) + step.norm(dim=-1) + 1e-6).all()
