"""The transform of quantised heads: what it does to vectors, and that its matrices are not copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompile.kernels import Transform

HEADS, GROUP, DIM = 3, 5, 8


@pytest.fixture
def transform() -> Transform:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(2):
        matrix = torch.eye(DIM) + 0.2 * torch.randn(HEADS, DIM, DIM, generator=generator)
        parts += [matrix, torch.linalg.inv(matrix), torch.randn(HEADS, DIM, generator=generator)]
    return Transform(*parts)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (4, 1), (2, 3)])
def test_logits_and_outputs_are_those_of_the_vectors_themselves(transform: Transform, batch: int, length: int) -> None:
    """q . k is kept up to q . mean, which is the same for every key; weighted sums of values come back."""
    query, keys = draw(batch, HEADS * GROUP, length, DIM), draw(batch, HEADS, 7, DIM)
    by_group = query.unflatten(1, (HEADS, GROUP))
    plain = torch.einsum("bhgtd,bhnd->bhgtn", by_group, keys - transform.key_mean[:, None])
    asked = transform.queries(query).unflatten(1, (HEADS, GROUP))
    torch.testing.assert_close(torch.einsum("bhgtd,bhnd->bhgtn", asked, transform.keys(keys)), plain, atol=1e-4, rtol=0)
    weights = plain.softmax(-1)
    mixed = torch.einsum("bhgtn,bhnd->bhgtd", weights, transform.values(keys)).flatten(1, 2)
    expected = torch.einsum("bhgtn,bhnd->bhgtd", weights, keys).flatten(1, 2)
    torch.testing.assert_close(transform.outputs(mixed), expected, atol=1e-5, rtol=0)


def test_some_heads_of_one_sequence(transform: Transform) -> None:
    keys = draw(2, 6, DIM)
    whole = transform.keys(torch.cat([keys[:1] * 0, keys]))
    torch.testing.assert_close(transform.keys(keys, slice(1, 3)), whole[1:])


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.elements = max(self.elements, out.numel())
        return out


def test_matrices_are_not_copied_for_every_sequence(transform: Transform) -> None:
    batch = 2
    query, keys = draw(batch, HEADS * GROUP, 1, DIM), draw(batch, HEADS, 1, DIM)
    with Largest() as largest:
        transform.outputs(transform.queries(query))
        transform.keys(keys)
        transform.values(keys)
    assert largest.elements <= max(query.numel(), transform.key.numel())
