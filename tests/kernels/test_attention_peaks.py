"""Peaks of attention, in C and in torch, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcompile.kernels import Softmax, attention_peaks
from kvcompile.kernels.attention_peaks import dense, reference
from kvcompile.kernels.native import peaks

HEADS = 2
SHAPES = [  # tokens of the context, own tokens, rows, group, head size
    (1, 1, 1, 1, 8),
    (13, 9, 5, 5, 16),
    (130, 40, 40, 7, 64),
    (257, 20, 1, 3, 80),
]
IDS = ["one", "few", "blocks", "odd"]


def setting(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    length, own, rows, group, dim = shape
    generator = torch.Generator().manual_seed(length + dim)
    query = torch.randn(HEADS * group, rows, dim, generator=generator) * 3
    keys, own_keys = (torch.randn(HEADS, n, dim, generator=generator) for n in (length, own))
    return query.to(dtype), keys.to(dtype), own_keys.to(dtype), torch.arange(own - rows, own), dim**-0.5


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_in_c(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = setting(shape, dtype)
    if not peaks.usable(args[0], args[1], args[2], 0, Softmax()):
        pytest.skip("no compiler")
    wanted = reference.attention_peaks(*args, 0, Softmax())
    torch.testing.assert_close(peaks.attention_peaks(*args), wanted, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_in_torch(shape: tuple[int, ...]) -> None:
    args = setting(shape, torch.float32)
    wanted = reference.attention_peaks(*args, 0, Softmax())
    torch.testing.assert_close(dense.attention_peaks(*args, 0, Softmax()), wanted, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("window", "softmax"),
    [(7, Softmax()), (0, Softmax(cap=2.0)), (0, Softmax(sinks=torch.linspace(-1, 2, 10)))],
    ids=["window", "cap", "sinks"],
)
def test_other_attention(window: int, softmax: Softmax) -> None:
    args = setting(SHAPES[1], torch.float32)
    assert not peaks.usable(args[0], args[1], args[2], window, softmax)
    wanted = reference.attention_peaks(*args, window, softmax)
    torch.testing.assert_close(attention_peaks(*args, window, softmax), wanted, rtol=2e-5, atol=1e-12)


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, keys, own_keys, places, scaling = setting(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="a row for each place"):
        attention_peaks(query, keys, own_keys, places[1:], scaling)
