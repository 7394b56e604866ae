"""The codecs of whole numbers, of one width and of several, against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcompile.kernels import decode, encode
from kvcompile.kernels.codecs import CODECS, codec_of

SIZES = st.sampled_from([2, 8, 16, 64, 72, 80, 96, 128, 256])
IDS = st.sampled_from([8, 4, 3, 2, 67, 66, 65])


@given(size=SIZES, bits=IDS, seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1e-2, 1, 300]))
def test_codes_and_scales_are_the_references(size: int, bits: int, seed: int, scale: float) -> None:
    codec = codec_of(bits)
    assume(codec.fits(size))
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    codes, scales = encode(vector, bits)
    reference = codec.load("reference")
    expected, expected_scales = reference.encode(vector)
    assert scales.tolist() == expected_scales
    # In float64 a quotient may fall on the other side of a whole number.
    step = steps(scales.double(), bits, size)
    differ = (
        decode(codes, scales, bits, torch.float64) - torch.tensor(reference.decode(expected, scales.tolist()))
    ).abs()
    assert (differ <= 1.001 * step).all()
    assert (differ > 0.001 * step).float().mean() < 0.1
    assert codes.numel() == codec.code_bytes(size)
    assert scales.numel() == codec.groups(size)


@given(size=SIZES, bits=IDS, seed=st.integers(0, 999))
def test_an_element_is_off_by_at_most_half_a_step(size: int, bits: int, seed: int) -> None:
    codec = codec_of(bits)
    assume(codec.fits(size))
    vectors = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    codes, scales = encode(vectors, bits)
    back = decode(codes, scales, bits, torch.float32)
    widths = torch.zeros(size)
    for group in codec.split(size):
        widths[group.start : group.start + group.size] = group.bits
    stored = widths > 0
    step = steps(scales.float(), bits, size)
    assert ((back - vectors).abs() <= step * (0.5 + 2 ** (widths - 11)) + 1e-6)[:, stored].all()
    assert (back[:, ~stored] == 0).all()


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_groups_cover_what_is_stored(head_dim: int) -> None:
    for codec in CODECS.values():
        split = codec.split(head_dim)
        assert len(split) == codec.groups(head_dim)
        assert sum(g.size * g.bits for g in split) == 8 * codec.code_bytes(head_dim)
        assert all(g.size <= codec.group for g in split)
        for one, after in itertools.pairwise(split):
            assert (after.start, after.byte) == (one.start + one.size, one.byte + one.size * one.bits // 8)


def test_how_codes_lie_in_bytes() -> None:
    codes, scales = encode(torch.tensor([-8.0, 7.9]), 4)
    assert (codes.tolist(), scales.tolist()) == ([0 | 15 << 4], [1.0])
    codes, scales = encode(torch.tensor([-2.0, -1.0, 0.5, 1.5]), 2)
    assert (codes.tolist(), scales.tolist()) == ([0 | 1 << 2 | 2 << 4 | 3 << 6], [1.0])
    # 0 to 7 in 3 bits: the low two bits twice 0, 1, 2, 3, then the high bits of the last four.
    codes, scales = encode(torch.arange(8) - 3.9, 3)
    assert (codes.tolist(), [round(s, 2) for s in scales.tolist()]) == ([0b11100100, 0b11100100, 0b11110000], [0.98])


def test_nothing_stays_finite() -> None:
    codes, scales = encode(torch.zeros(2, 64), 8)
    assert decode(codes, scales, 8, torch.float32).abs().max() < 1e-4
    assert (scales > 0).all()


@pytest.mark.parametrize(("size", "bits"), [(64, 7), (3, 8), (65, 4), (0, 8), (12, 3), (6, 2), (8, 65)])
def test_what_cannot_be_stored_is_refused(size: int, bits: int) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        encode(torch.zeros(1, size), bits)


def steps(scales: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """The step [..., D] of every element, 0 where nothing is stored."""
    found = scales.new_zeros(*scales.shape[:-1], size)
    for i, group in enumerate(codec_of(bits).split(size)):
        found[..., group.start : group.start + group.size] = scales[..., i, None]
    return found
