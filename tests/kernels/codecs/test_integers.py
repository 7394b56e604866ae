"""Codecs of whole numbers, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.kernels import decode, encode
from kvcompile.kernels.codecs import codec_of

IDS = (8, 4, 3, 2, 67, 66, 65)
SHAPES = [(bits, size) for bits in IDS for size in (2, 8, 16, 64, 72, 80, 96, 128, 256) if codec_of(bits).fits(size)]
"""Ids and sizes that go together."""


def steps(scales: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """The scale of every element, float64 [..., D]; 0 of elements that are not stored."""
    found = torch.zeros(*scales.shape[:-1], size, dtype=torch.float64)
    for g, group in enumerate(codec_of(bits).split(size)):
        found[..., group.start : group.start + group.size] = scales[..., g : g + 1].double()
    return found


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1e-2, 1, 300]))
def test_codes_and_scales_are_the_references(shape: tuple[int, int], seed: int, scale: float) -> None:
    bits, size = shape
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    codes, scales = encode(vector, bits)
    reference = codec_of(bits).load("reference")
    expected, expected_scales = reference.encode(vector)
    assert scales.tolist() == expected_scales
    # In float64 a quotient may fall on the other side of a whole number.
    wanted = torch.tensor(reference.decode(expected, expected_scales), dtype=torch.float64)
    differ = (decode(codes, scales, bits, torch.float64) - wanted).abs()
    step = steps(scales, bits, size)
    assert (differ <= 1.001 * step).all()
    assert (differ > 0.001 * step).float().mean() < 0.1
    assert codes.numel() == len(expected) == size * (bits % 64) // 8


@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 999))
def test_an_element_is_off_by_at_most_half_a_step(shape: tuple[int, int], seed: int) -> None:
    bits, size = shape
    vectors = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    codes, scales = encode(vectors, bits)
    back, step = decode(codes, scales, bits, torch.float32), steps(scales, bits, size)
    stored, widest = step > 0, max(group.bits for group in codec_of(bits).split(size))
    assert ((back - vectors).abs() <= step * (0.5 + 2 ** (widest - 11)) + 1e-6)[stored].all()
    assert (back == 0)[~stored].all()


def test_the_first_of_two_codes_is_the_low_half() -> None:
    codes, scales = encode(torch.tensor([-8.0, 7.9]), 4)
    assert (codes.tolist(), scales.tolist()) == ([0 | 15 << 4], [1.0])


def test_nothing_stays_finite() -> None:
    codes, scales = encode(torch.zeros(2, 64), 8)
    assert decode(codes, scales, 8, torch.float32).abs().max() < 1e-4
    assert (scales > 0).all()


@pytest.mark.parametrize(("size", "bits"), [(64, 5), (12, 3), (6, 2), (4, 67), (8, 65), (3, 8), (65, 4), (0, 8)])
def test_what_cannot_be_stored_is_refused(size: int, bits: int) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        encode(torch.zeros(1, size), bits)
