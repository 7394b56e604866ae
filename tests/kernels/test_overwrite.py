"""Writing into the store, against the references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.kernels import overwrite
from kvcompile.kernels.overwrite import reference as overwrite_reference


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    capacity=st.integers(1, 6),
    length=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_overwrite(batch: int, heads: int, capacity: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    store = torch.randn(batch, heads, capacity, 4, generator=generator).half()
    new = torch.randn(batch, heads, length, 4, generator=generator)
    choices = torch.cat([torch.arange(capacity), torch.full((length,), -1)])  # distinct, or dropped
    slot = torch.stack(
        [choices[torch.randperm(len(choices), generator=generator)[:length]] for _ in range(batch * heads)]
    ).view(batch, heads, length)
    expected = store.clone()
    overwrite_reference.overwrite(expected, new, slot)
    overwrite(store, new, slot)
    assert torch.equal(store, expected)


def test_overwrite_writes_through_a_view() -> None:
    flat = torch.zeros(2, 6, 4)
    overwrite(flat.unflatten(1, (2, 3)), torch.ones(2, 2, 1, 4), torch.tensor([[[0], [2]], [[1], [-1]]]))
    assert flat[:, :, 0].tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0]]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        overwrite(torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, dtype=torch.int64))
