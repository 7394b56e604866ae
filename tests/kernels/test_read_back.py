"""What vectors read as is what a store of them reads as, in C and through torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from stored import reads_alike

from kvcompile.kernels import decode, encode, read_back
from kvcompile.kernels.codecs import CODECS, codec_of


@pytest.fixture(params=["", "torch"], ids=["native", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In C where there is a compiler, and through torch."""
    monkeypatch.setenv("KVCOMPILE_KERNELS", request.param)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    bits=st.sampled_from(list(CODECS)),
    shape=st.lists(st.integers(0, 3), max_size=2),
    size=st.sampled_from([2, 8, 16, 64, 72, 80, 96, 128, 192, 256, 576]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 300.0]),
    seed=st.integers(0, 999),
)
def test_read_back(
    kernels: None, bits: int, shape: list[int], size: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    codec = codec_of(bits)
    assume(codec.fits(size))
    vectors = (torch.randn(*shape, size, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    codes, scales = encode(vectors, bits)
    expected, found = decode(codes, scales, bits, torch.float32), read_back(vectors, bits)
    assert (found.shape, found.dtype) == (vectors.shape, torch.float32)
    assert reads_alike(found, expected, bits)


def test_a_view_of_every_second_vector(kernels: None) -> None:
    vectors = torch.randn(3, 10, 64, generator=torch.Generator().manual_seed(0)).transpose(0, 1)[::2]
    torch.testing.assert_close(read_back(vectors, 4), read_back(vectors.contiguous(), 4), rtol=0, atol=0)


@pytest.mark.parametrize(("size", "bits"), [(64, 7), (3, 8), (65, 4), (0, 8)])
def test_what_cannot_be_stored_is_refused(kernels: None, size: int, bits: int) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        read_back(torch.zeros(1, size), bits)
