"""Slots and views of a layer's store."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.kernels import HeadClass, LayerLayout


def test_equal_neighbours_form_a_class() -> None:
    layout = LayerLayout.from_heads([("full", 9, 4, 5), ("recent", 3, 1, 2), ("recent", 3, 1, 2), ("recent", 2, 1, 1)])
    assert [(c.start, c.count, c.capacity, c.offset) for c in layout.classes] == [
        (0, 1, 9, 0),
        (1, 2, 3, 9),
        (3, 1, 2, 15),
    ]
    assert (layout.num_kv_heads, layout.slots) == (4, 17)


def test_views_cover_the_store_without_a_copy() -> None:
    layout = LayerLayout.from_heads([("recent", 5, 1, 4)] * 2 + [("recent", 3, 0, 3)])
    store = torch.zeros(2, layout.slots, 4)
    for i, cls in enumerate(layout.classes, start=1):
        cls.view(store).fill_(i)
    assert store[0, :, 0].tolist() == [1.0] * 10 + [2.0] * 3
    assert (store != 0).all()


@given(capacity=st.integers(1, 12), ring=st.integers(1, 12), tokens=st.integers(1, 60))
def test_a_ring_holds_the_first_and_the_last_tokens(capacity: int, ring: int, tokens: int) -> None:
    ring = min(ring, capacity)
    cls = HeadClass("recent", 0, 1, capacity, capacity - ring, ring, 0)
    held: dict[int, int] = {}
    for token in range(tokens):
        held[cls.ring_slot(token)] = token
    if tokens <= capacity:
        expected = set(range(tokens))
    else:
        expected = set(range(capacity - ring)) | set(range(tokens - ring, tokens))
    assert set(held.values()) == expected
    assert all(0 <= slot < capacity for slot in held)


@pytest.mark.parametrize("count", [1, 3])
def test_a_view_of_one_class_in_a_batch_is_writable(count: int) -> None:
    layout = LayerLayout.from_heads([("recent", 4, 0, 4)] * count)
    store = torch.zeros(3, layout.slots, 2)
    layout.classes[0].view(store)[1, count - 1, 2] = 7
    assert store[1, (count - 1) * 4 + 2].tolist() == [7.0, 7.0]
    assert store.count_nonzero() == 2
