"""Heads on tensor-parallel ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.artifacts import TargetError
from kvcompile.assemble.placement import GAP, place


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 1000), min_size=6, max_size=6), ranks=st.sampled_from([1, 2, 3, 6]))
def test_the_fullest_rank_of_a_layer_is_as_small_as_can_be(sizes: list[int], ranks: int) -> None:
    placed = place(np.array([sizes]), ranks)
    each = 6 // ranks
    assert np.bincount(placed.rank[0], minlength=ranks).tolist() == [each] * ranks
    assert placed.load[0].tolist() == [
        sum(s for s, r in zip(sizes, placed.rank[0], strict=True) if r == k) for k in range(ranks)
    ]
    best = min(
        max(sum(order[i * each : (i + 1) * each]) for i in range(ranks)) for order in itertools.permutations(sizes)
    )
    assert placed.load[0].max() * (1 - GAP) <= best * (1 + 1e-6)


def test_a_case_that_the_gap_leaves() -> None:
    """999 is possible: 178 + 209 + 612."""
    placed = place(np.array([[178, 178, 179, 209, 612, 612]]), 2)
    assert 999 <= placed.load.max() <= 1000


def test_layers_even_each_other_out() -> None:
    size = np.array([[100, 1]] * 10)
    placed = place(size, 2)
    assert placed.load.sum(0).tolist() == [505, 505]
    assert placed.report() == pytest.approx({"ranks": 2, "layer_imbalance": 200 / 101, "total_imbalance": 1.0})


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(TargetError, match="3 KV heads do not divide among 2 ranks"):
        place(np.ones((1, 3), np.int64), 2)
