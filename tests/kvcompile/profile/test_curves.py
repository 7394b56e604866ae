from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.profile.curves import BLOCK, budget_grid, recent_losses, sampled_positions


def brute_force(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    scaling: float,
    positions: Tensor,
    budget: int,
    sink: int,
) -> Tensor:
    """1/2 mean_t (sum_q u . (masked attention - attention))^2 of every KV head, the attention written out."""
    group = len(query) // len(key)
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    place = torch.arange(key.shape[1])
    causal = place <= place[:, None]
    kept = causal & ((place < sink) | (place > place[:, None] - (budget - sink)))
    weights = query @ key.mT * scaling
    outputs = [weights.masked_fill(~mask, -torch.inf).softmax(-1) @ value for mask in (kept, causal)]
    error = (gradient * (outputs[0] - outputs[1])).sum(-1)[:, positions]
    return error.view(-1, group, len(positions)).sum(1).square().mean(-1) / 2


@settings(deadline=None, max_examples=40)
@given(
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 5, 7]),
    length=st.integers(11, 300),
    head_dim=st.sampled_from([3, 8]),
    sink=st.integers(0, 4),
    queries=st.integers(1, 200),
    seed=st.integers(0, 2**16),
)
def test_losses_equal_masked_softmax(
    heads: int, group: int, length: int, head_dim: int, sink: int, queries: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, gradient = torch.randn(2, heads * group, length, head_dim, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, heads, length, head_dim, generator=generator, dtype=torch.float64)
    positions = sampled_positions(length, queries)
    budgets = torch.from_numpy(budget_grid(length, sink, 9).astype(np.int64))
    losses = recent_losses(
        query.float(),
        key.float(),
        value.float(),
        gradient.float(),
        scaling=0.7,
        positions=positions,
        budgets=budgets,
        sink=sink,
    )
    expected = [brute_force(query, key, value, gradient, 0.7, positions, int(b), sink) for b in budgets]
    torch.testing.assert_close(losses, torch.stack(expected, 1), rtol=2e-3, atol=1e-9)
    assert losses[:, -1].eq(0).all()


def test_small_recent_mass_keeps_its_precision() -> None:
    """A sink that draws nearly all attention leaves a mass that a difference of prefix sums would lose in float32."""
    length, budget = 2 * BLOCK + 5, 9
    query, key = torch.ones(1, length, 1), torch.zeros(1, length, 1)
    key[0, 1] = 18.0  # not among the kept tokens, and 1e8 times as attractive as they are
    generator = torch.Generator().manual_seed(0)
    value, gradient = torch.randn(1, length, 1, generator=generator), torch.randn(1, length, 1, generator=generator)
    positions = sampled_positions(length, 64)
    losses = recent_losses(
        query, key, value, gradient, scaling=1.0, positions=positions, budgets=torch.tensor([budget]), sink=1
    )
    expected = brute_force(
        query.double(), key.double(), value.double(), gradient.double(), 1.0, positions, budget, sink=1
    )
    torch.testing.assert_close(losses[:, 0], expected, rtol=1e-4, atol=0)


@given(window=st.integers(10, 200_000), sink=st.integers(0, 4))
def test_grid_spans_the_window(window: int, sink: int) -> None:
    grid = budget_grid(window, sink)
    assert grid.dtype == np.int32
    assert (grid[0], grid[-1]) == (sink + 1, window)
    assert (np.diff(grid) > 0).all()
    assert len(grid) <= 40
    assert (np.diff(grid, 2) >= -1).all(), "dense at the small end"


@given(window=st.integers(2, 5000), count=st.integers(1, 600))
def test_positions_spread_over_the_last_half(window: int, count: int) -> None:
    positions = sampled_positions(window, count)
    assert len(positions) == min(count, window - window // 2)
    assert positions[0] == window // 2
    assert positions[-1] <= window - 1
    steps = positions.diff()
    assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)
