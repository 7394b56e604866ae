"""The codecs of whole numbers, of one width and of several, against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from stored import reads_alike

from kvcompile.kernels import decode, encode
from kvcompile.kernels.codecs import CODECS, codec_of

SIZES = st.sampled_from([2, 8, 16, 64, 72, 80, 96, 128, 256])
IDS = st.sampled_from([8, 4, 3, 2, 67, 66, 65])


@given(size=SIZES, bits=IDS, seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1e-2, 1, 300]))
def test_what_is_read_is_the_references(size: int, bits: int, seed: int, scale: float) -> None:
    codec = codec_of(bits)
    assume(codec.fits(size))
    vector = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    codes, scales = encode(vector, bits)
    reference = codec.load("reference")
    expected = torch.tensor(reference.decode(*reference.encode(vector)))
    assert reads_alike(decode(codes, scales, bits, torch.float32), expected, bits)
    assert codes.numel() == codec.code_bytes(size)
    assert scales.numel() == codec.groups(size)


@given(size=SIZES, bits=IDS, seed=st.integers(0, 999), heavy=st.booleans())
def test_norm_or_product_are_kept_and_the_angle_is_no_larger_than_by_rounding(
    size: int, bits: int, seed: int, heavy: bool
) -> None:
    codec = codec_of(bits)
    assume(codec.fits(size))
    vectors = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    vectors = vectors**3 if heavy else vectors
    back = decode(*encode(vectors, bits), bits, torch.float32)
    for group in codec.split(size):
        x, y = (part[:, group.start : group.start + group.size] for part in (vectors, back))
        kept = x * y if codec.name in ("mix2", "mix1") else y * y
        torch.testing.assert_close(kept.sum(1), x.square().sum(1), rtol=2e-3, atol=0)  # scales are float16
        half = 2 ** (group.bits - 1)
        plain = (x / x.abs().amax(1, keepdim=True) * half).floor().clamp(-half, half - 1) + 0.5
        # Later steps count a little less.
        assert (torch.cosine_similarity(x, y) >= torch.cosine_similarity(x, plain) * (1 - 2**-15) - 1e-6).all()
    stored = sum(group.size for group in codec.split(size))
    assert (back[:, stored:] == 0).all()


def test_of_few_bits_the_angle_is_smaller_than_by_rounding() -> None:
    vectors = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    for bits, gain in ((2, 0.88), (3, 0.95), (4, 0.99)):
        half = 2 ** (bits - 1)
        plain = (vectors / vectors.abs().amax(1, keepdim=True) * half).floor().clamp(-half, half - 1) + 0.5
        back = decode(*encode(vectors, bits), bits, torch.float32)
        lost, by_rounding = (1 - torch.cosine_similarity(vectors, y).square().mean() for y in (back, plain))
        assert lost < gain * by_rounding


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
    codes, scales = encode(torch.tensor([-7.5, 7.5]), 4)
    assert (codes.tolist(), scales.tolist()) == ([0 | 15 << 4], [1.0])
    codes, scales = encode(torch.tensor([-1.5, -0.5, 0.5, 1.5]), 2)
    assert (codes.tolist(), scales.tolist()) == ([0 | 1 << 2 | 2 << 4 | 3 << 6], [1.0])
    # 0 to 7 in 3 bits: the low two bits twice 0, 1, 2, 3, then the high bits of the last four.
    codes, scales = encode(torch.arange(8) - 3.5, 3)
    assert (codes.tolist(), scales.tolist()) == ([0b11100100, 0b11100100, 0b11110000], [1.0])


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_nothing_and_too_much_stay_finite(bits: int) -> None:
    codes, scales = encode(torch.zeros(2, 64), bits)
    assert decode(codes, scales, bits, torch.float32).abs().max() < 1e-4
    assert (scales > 0).all()
    back = decode(*encode(torch.full((2, 64), -1e30), bits), bits, torch.float32)
    assert back.isfinite().all()
    assert (back < -60000).all()


@pytest.mark.parametrize(("size", "bits"), [(64, 7), (3, 8), (65, 4), (0, 8), (12, 3), (6, 2), (8, 65)])
def test_what_cannot_be_stored_is_refused(size: int, bits: int) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        encode(torch.zeros(1, size), bits)
