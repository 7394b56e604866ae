"""Keys and values as they are read back: what the runtime stores, and what the transform is good for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcompile.artifacts import Quantiser
from kvcompile.kernels import decode, encode
from kvcompile.kernels.codecs import codec_of, profiled
from kvcompile.profile.quantised import Errors, matrices, quantised
from kvcompile.quantiser import balanced


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 64, 96])
def test_the_compiler_quantises_as_the_runtime_does(bits: int, size: int) -> None:
    rng = np.random.default_rng(0)
    transform = torch.tensor(balanced(np.diag(rng.uniform(0.1, 9, size)), np.eye(size)), dtype=torch.float32)
    mean, stored = torch.randn(size), torch.randn(7, size)
    found = quantised(stored, transform, mean, bits)
    transformed = (stored - mean) @ transform.mT
    expected = decode(*encode(transformed, bits), bits, torch.float32)
    expected[0] = transformed[0]
    torch.testing.assert_close(found, expected @ torch.linalg.inv(transform).mT + mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("size", [16, 64, 96])
def test_errors_are_what_is_read_back_less_what_was_stored(kind: str, size: int) -> None:
    rng = np.random.default_rng(0)
    tables = [balanced(np.diag(rng.uniform(0.1, 9, size)), np.eye(size)).astype(np.float16) for _ in range(3)]
    transform, mean = np.stack(tables)[None], rng.standard_normal((1, 3, size)).astype(np.float16)
    quantiser = Quantiser(transform, mean, transform, mean)
    stored = torch.from_numpy(rng.standard_normal((3, 40, size)).astype(np.float32))
    found = Errors(quantiser, kind, stored.device).of(stored)
    for bits, error in zip(profiled(kind[0]), found, strict=True):
        expected = quantised(stored, *matrices(quantiser, 0, kind, stored.device), bits) - stored
        # Products in another order may give the neighbour of a scale, 2^-10 of it away.
        torch.testing.assert_close(error, expected, rtol=1e-3, atol=5e-3)
        assert bool(error.any()) == codec_of(bits).fits(size)


def test_quantising_balanced_keys_beats_plain_ones_where_it_matters() -> None:
    """Outlier channels that queries hardly look at ruin plain quantisation."""
    rng = np.random.default_rng(0)
    scale = np.where(np.arange(64) % 16 == 3, 30.0, 1.0)
    keys = torch.tensor(rng.standard_normal((500, 64)) * scale, dtype=torch.float32)
    queries = torch.tensor(rng.standard_normal((200, 64)) / scale, dtype=torch.float32)
    transform = torch.tensor(balanced(np.cov(keys.T), np.cov(queries.T)), dtype=torch.float32)
    errors = [
        (queries @ (quantised(keys, matrix, torch.zeros(64), 4) - keys).mT).square().mean().item()
        for matrix in (torch.eye(64), transform)
    ]
    assert errors[1] < errors[0] / 20


@pytest.mark.parametrize("bits", [67, 66, 65])
def test_sections_take_the_directions_that_matter_most(bits: int) -> None:
    """Of keys whose directions matter unequally, a codec with sections loses less than its bits would alone."""
    generator = np.random.default_rng(0)
    size, weight = 64, 2.0 ** -np.arange(0, 16, 0.25)
    turned = np.linalg.qr(generator.standard_normal((2, size, size)))[0]
    covariance, against = ((t * weight) @ t.T for t in turned)
    transform = torch.from_numpy(balanced(covariance, against).astype(np.float32))
    keys = torch.from_numpy(generator.multivariate_normal(np.zeros(size), covariance, 400).astype(np.float32))
    queries = torch.from_numpy(generator.multivariate_normal(np.zeros(size), against, 300).astype(np.float32))

    def error(codec: int) -> float:
        lost = quantised(keys, transform, torch.zeros(size), codec) - keys
        return float((queries @ lost.T).square().mean())

    flat = {67: 3, 66: 2, 65: 2}[bits]
    assert error(bits) < (1.0 if bits == 65 else 0.6) * error(flat)
