"""The gradient of attention to a context and a follow-up, in C and in torch, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvcompile.kernels import followed
from kvcompile.kernels.attention_gradient import dense
from kvcompile.kernels.native import gradient

HEADS = 2
SHAPES = [  # tokens of the context and own ones, group, head size
    (1, 1, 1, 8),
    (13, 9, 5, 16),
    (130, 40, 7, 64),
    (257, 21, 3, 80),
]
IDS = ["one", "few", "blocks", "odd"]


def setting(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, gradient at the output, keys and values of the context, own keys and values."""
    length, own, group, dim = shape
    generator = torch.Generator().manual_seed(length + dim)
    sizes = [(HEADS * group, own)] * 2 + [(HEADS, length)] * 2 + [(HEADS, own)] * 2
    return tuple(torch.randn(*size, dim, generator=generator).to(dtype) for size in sizes)


def explicit(
    query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, scaling: float
) -> Tensor:
    k, v = torch.cat([keys, own_keys], 1), torch.cat([values, own_values], 1)
    k, v = (t.repeat_interleave(len(query) // HEADS, 0) for t in (k, v))
    seen = torch.ones(query.shape[1], k.shape[1], dtype=torch.bool).tril(keys.shape[1])
    return (query @ k.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def expected(tensors: tuple[Tensor, ...], scaling: float) -> list[Tensor]:
    query, upstream, keys, values, own_keys, own_values = (t.double() for t in tensors)
    moving = [t.requires_grad_() for t in (query, own_keys, own_values)]
    output = explicit(query, keys, values, own_keys, own_values, scaling)
    return [t.float() for t in torch.autograd.grad(output, moving, upstream)]


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"])
def test_in_c(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    tensors = setting(shape, dtype)
    if not gradient.usable(tensors[0], tensors[2]):
        pytest.skip("no compiler")
    found = gradient.attention_gradient(*tensors, 0.3)
    for one, other in zip(found, expected(tensors, 0.3), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_in_torch(shape: tuple[int, ...]) -> None:
    tensors = setting(shape, torch.float32)
    for one, other in zip(dense.attention_gradient(*tensors, 0.3), expected(tensors, 0.3), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize("where", ["", "torch"])
def test_through_autograd(shape: tuple[int, ...], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where:
        monkeypatch.setenv("KVCOMPILE_KERNELS", where)
    query, upstream, keys, values, own_keys, own_values = setting(shape, torch.float32)
    moving = [t.requires_grad_() for t in (query, own_keys, own_values)]
    output = followed(query, keys, values, own_keys, own_values, 0.3)
    torch.testing.assert_close(output, explicit(query, keys, values, own_keys, own_values, 0.3), rtol=2e-5, atol=2e-5)
    found = torch.autograd.grad(output, moving, upstream)
    wanted = expected((query.detach(), upstream, keys, values, own_keys.detach(), own_values.detach()), 0.3)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_a_known_output_has_the_same_gradient() -> None:
    query, upstream, keys, values, own_keys, own_values = setting(SHAPES[2], torch.float32)
    moving = [t.requires_grad_() for t in (query, own_keys, own_values)]
    output = followed(query, keys, values, own_keys, own_values, 0.3)
    again = followed(query, keys, values, own_keys, own_values, 0.3, output.detach())
    assert torch.equal(again, output)
    for one, other in zip(*(torch.autograd.grad(o, moving, upstream) for o in (output, again)), strict=True):
        assert torch.equal(one, other)
