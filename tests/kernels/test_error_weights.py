"""Weights of errors, in C and in torch, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcompile.kernels import Rows, Softmax, error_weights
from kvcompile.kernels.error_weights import dense, reference
from kvcompile.kernels.error_weights.values import Weights
from kvcompile.kernels.native import errors

HEADS = 2
SHAPES = [  # tokens of the context, own tokens, rows, group, head size
    (1, 1, 1, 1, 8),
    (13, 9, 5, 5, 16),
    (130, 60, 60, 7, 64),
    (257, 20, 1, 3, 80),
]
IDS = ["one", "few", "blocks", "odd"]


Setting = tuple[list[Rows], Tensor, Tensor, Tensor, float]


def setting(shape: tuple[int, ...], dtype: torch.dtype) -> Setting:
    """Two follow-ups, the second with one row."""
    length, own, rows, group, dim = shape
    generator = torch.Generator().manual_seed(length + dim)

    def draw(heads: int, count: int) -> Tensor:
        return torch.randn(heads, count, dim, generator=generator).to(dtype)

    keys, values = draw(HEADS, length), draw(HEADS, length)
    asked = [
        Rows(draw(HEADS * group, count) * 2, draw(HEADS, own), torch.arange(own - count, own)) for count in (rows, 1)
    ]
    outward = torch.randn(HEADS * group, dim + 3, dim, generator=generator)
    return asked, keys, values, outward.mT @ outward / dim, dim**-0.5


def usable(args: Setting, window: int, softmax: Softmax) -> bool:
    asked, keys, *_ = args
    return all(errors.usable(one.query, keys, one.own_keys, window, softmax) for one in asked)


def compare(found: list[Weights], wanted: list[Weights], tolerance: float) -> None:
    for of_one, expected in zip(found, wanted, strict=True):
        for name in ("keys", "values", "queries", "outputs"):
            one, other = getattr(of_one, name), getattr(expected, name)
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.max()))
        assert (of_one.keys[:, 0] == 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_in_c(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    args = setting(shape, dtype)
    if not usable(args, 0, Softmax()):
        pytest.skip("no compiler")
    compare(errors.error_weights(*args), reference.error_weights(*args, 0, Softmax()), tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_in_torch(shape: tuple[int, ...]) -> None:
    args = setting(shape, torch.float32)
    compare(dense.error_weights(*args, 0, Softmax()), reference.error_weights(*args, 0, Softmax()), 5e-5)


@pytest.mark.parametrize(
    ("window", "softmax"),
    [(7, Softmax()), (0, Softmax(cap=2.0)), (0, Softmax(sinks=torch.linspace(-1, 2, 10)))],
    ids=["window", "cap", "sinks"],
)
def test_other_attention(window: int, softmax: Softmax) -> None:
    args = setting(SHAPES[1], torch.float32)
    assert not usable(args, window, softmax)
    compare(error_weights(*args, window, softmax), reference.error_weights(*args, window, softmax), 5e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    asked, keys, values, metric, scaling = setting(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="a row for each place"):
        error_weights([replace(asked[0], places=asked[0].places[1:])], keys, values, metric, scaling)
    with pytest.raises(ValueError, match="metric"):
        error_weights(asked, keys, values, metric[1:], scaling)
