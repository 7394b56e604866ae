"""Dividing tokens by weights."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.allocators.distribute import distribute

HEADS = st.integers(1, 20)


@given(data=st.data(), count=HEADS, total=st.integers(0, 5000))
def test_the_sum_and_the_bounds_hold(data: st.DataObject, count: int, total: int) -> None:
    weights = np.array(data.draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count)))
    floor = np.array(data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)))
    cap = floor + np.array(data.draw(st.lists(st.integers(0, 300), min_size=count, max_size=count)))
    tokens = distribute(weights, total, floor, cap)
    assert (tokens >= floor).all()
    assert (tokens <= cap).all()
    assert tokens.sum() == np.clip(total, floor.sum(), cap.sum())


@given(count=HEADS, total=st.integers(100, 5000), seed=st.integers(0, 99))
def test_more_weight_never_means_fewer_tokens(count: int, total: int, seed: int) -> None:
    weights = np.sort(np.random.default_rng(seed).random(count))
    tokens = distribute(weights, total, np.full(count, 5), np.full(count, 400))
    assert (np.diff(tokens) >= -1).all()  # one token is the rounding


def test_proportional_between_the_bounds() -> None:
    tokens = distribute(np.array([1.0, 2.0, 3.0]), 600, np.full(3, 5), np.full(3, 1000))
    assert tokens.tolist() == [100, 200, 300]


def test_what_a_full_head_cannot_hold_goes_to_the_others() -> None:
    assert distribute(np.array([1.0, 1.0, 8.0]), 300, np.full(3, 5), np.full(3, 100)).tolist() == [100, 100, 100]
    assert distribute(np.array([0.0, 0.0, 8.0]), 200, np.full(3, 5), np.full(3, 100)).tolist() == [50, 50, 100]
