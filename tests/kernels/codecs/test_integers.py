"""int8 and int4, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.kernels import decode, encode
from kvcompile.kernels.codecs import codec_of

SIZES = st.sampled_from([2, 8, 16, 64, 72, 80, 96, 128, 256])


@given(size=SIZES, bits=st.sampled_from([4, 8]), seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1e-2, 1, 300]))
def test_codes_and_scales_are_the_references(size: int, bits: int, seed: int, scale: float) -> None:
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    codes, scales = encode(vector, bits)
    reference = codec_of(bits).load("reference")
    expected, expected_scales = reference.encode(vector)
    assert scales.tolist() == expected_scales
    # In float64 a quotient may fall on the other side of a whole number.
    unpacked = decode(codes, scales, bits, torch.float64) / scales.double().repeat_interleave(size // len(scales))
    wanted = torch.tensor(reference.decode(expected, expected_scales), dtype=torch.float64)
    wanted /= scales.double().repeat_interleave(size // len(scales))
    differ = (unpacked - wanted).abs()
    assert differ.max() <= 1.001
    assert (differ > 0.001).float().mean() < 0.1
    assert codes.numel() == size * bits // 8


@given(size=SIZES, bits=st.sampled_from([4, 8]), seed=st.integers(0, 999))
def test_an_element_is_off_by_at_most_half_a_step(size: int, bits: int, seed: int) -> None:
    vectors = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    codes, scales = encode(vectors, bits)
    back = decode(codes, scales, bits, torch.float32)
    step = scales.float().repeat_interleave(size // scales.shape[-1], dim=-1)
    assert ((back - vectors).abs() <= step * (0.5 + 2 ** (bits - 11)) + 1e-6).all()


def test_the_first_of_two_codes_is_the_low_half() -> None:
    codes, scales = encode(torch.tensor([-8.0, 7.9]), 4)
    assert (codes.tolist(), scales.tolist()) == ([0 | 15 << 4], [1.0])


def test_nothing_stays_finite() -> None:
    codes, scales = encode(torch.zeros(2, 64), 8)
    assert decode(codes, scales, 8, torch.float32).abs().max() < 1e-4
    assert (scales > 0).all()


@pytest.mark.parametrize(("size", "bits"), [(64, 3), (3, 8), (65, 4), (0, 8)])
def test_what_cannot_be_stored_is_refused(size: int, bits: int) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        encode(torch.zeros(1, size), bits)
