"""Losses against attention written out."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.kernels import Changes
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, pack
from kvcompile.profile.eviction import SHARES, budget_grid, entries, ring, survivors
from kvcompile.profile.fitted import Kept
from kvcompile.profile.losses import losses


class Asked:
    def __init__(self, kind: str, first: int, length: int) -> None:
        self.kind, self.first, self.ids = kind, first, np.zeros(length, np.int64)


def written_out(query, keys, values, own_keys, own_values, kept, scaling):
    """Attention output [G, m, D] of one head's follow-up over the kept tokens of a context and itself, float64."""
    k, v = torch.cat([keys[kept], own_keys]).double(), torch.cat([values[kept], own_values]).double()
    weights = query.double() @ k.mT * scaling
    rows, past = query.shape[1], int(kept.sum())
    hidden = torch.ones(rows, past + rows, dtype=torch.bool).triu(past + 1)
    return weights.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@settings(deadline=None, max_examples=25)
@given(
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 5, 7]),
    length=st.integers(12, 60),
    sink=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
def test_losses_are_those_of_attention_written_out(heads: int, group: int, length: int, sink: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dim, sizes, firsts = 4, (9, 5), (2, 0)
    total, scaling = sum(sizes), 0.7

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    context = Context([draw(length, 3)], [draw(heads, length, dim)], [draw(heads, length, dim)])
    packed = pack(length, [Asked("quote", firsts[0], sizes[0]), Asked("question", firsts[1], sizes[1])])
    call = Attention(
        0, draw(heads * group, total, dim), draw(heads, total, dim), draw(heads, total, dim), scaling, None
    )
    gradient, score = draw(heads * group, total, dim), draw(heads, length)
    budgets = budget_grid(length, sink, 5)
    other_keys, other_values = draw(heads, length, dim), draw(heads, length, dim)
    changed = (other_keys - context.keys[0],), (other_values - context.values[0],)
    entry = entries(score, budgets, sink)
    found = losses(call, gradient, context, packed, Changes(entry, len(budgets), *changed))
    every = torch.ones(length, dtype=torch.bool)
    for block in packed.blocks:
        own, judged = slice(block.start, block.stop), slice(block.judged - block.start, None)
        for h in range(heads):
            q = call.query[h * group : (h + 1) * group, own]
            u = gradient[h * group : (h + 1) * group, own].double()
            mine = call.key[h, own], call.value[h, own]
            keys, values = context.keys[0][h], context.values[0][h]
            full = written_out(q, keys, values, *mine, every, scaling)

            def cost(output: torch.Tensor, u=u, full=full, judged=judged) -> float:
                error = (u * (output - full)).sum(-1).sum(0)[judged]
                return float(error.square().mean() / 2)

            for p, share in enumerate(SHARES):
                for c, budget in enumerate(budgets.tolist()):
                    kept = survivors(score, budget, ring(budget, share, sink), sink)[h]
                    assert kept.sum() == budget
                    assert torch.equal(kept, entry[h, :, p] <= c)
                    expected = cost(written_out(q, keys, values, *mine, kept, scaling))
                    np.testing.assert_allclose(found.evicted[block.kind][h, p, c], expected, rtol=2e-3, atol=1e-8)
            expected = cost(written_out(q, other_keys[h], values, *mine, every, scaling))
            np.testing.assert_allclose(found.keys[block.kind][h, 0], expected, rtol=2e-3, atol=1e-8)
            expected = cost(written_out(q, keys, other_values[h], *mine, every, scaling))
            np.testing.assert_allclose(found.values[block.kind][h, 0], expected, rtol=2e-3, atol=1e-8)
    assert all((table[..., -1] == 0).all() for table in found.evicted.values())


def test_losses_of_codecs_among_kept_tokens() -> None:
    """What is left of a layer, with errors in all of it, against the same without."""
    heads, length, dim, scaling = 2, 40, 4, 0.7
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    packed = pack(length, [Asked("quote", 1, 6)])
    call = Attention(0, draw(heads, 6, dim), draw(heads, 6, dim), draw(heads, 6, dim), scaling, None)
    gradient, keys, score = draw(heads, 6, dim), draw(heads, length, dim), draw(heads, length)
    alive = survivors(score, 11, 4, 2)
    kept = Kept(alive, draw(heads, length, dim))
    left = kept.context(keys)
    assert torch.equal(left.keys[0][1], keys[1][alive[1]])
    assert torch.equal(left.values[0][1], kept.values[1][alive[1]])
    errors = draw(heads, 11, dim), draw(heads, 11, dim)
    changes = Changes(torch.zeros(heads, 11, 1, dtype=torch.int32), 1, (errors[0],), (errors[1],))
    found, every = losses(call, gradient, left, packed, changes), torch.ones(11, dtype=torch.bool)
    for h in range(heads):
        given = left.keys[0][h], left.values[0][h]
        own = call.query[h : h + 1], call.key[h], call.value[h]
        exact = written_out(own[0], *given, *own[1:], every, scaling)
        for table, k, v in ((found.keys, errors[0][h], 0), (found.values, 0, errors[1][h])):
            other = written_out(own[0], given[0] + k, given[1] + v, *own[1:], every, scaling)
            error = (gradient[h].double() * (other - exact)[0]).sum(-1)[1:]
            np.testing.assert_allclose(table["quote"][h, 0], float(error.square().mean() / 2), rtol=2e-3)


def test_survivors_are_sinks_recent_and_the_best_of_the_rest() -> None:
    score = torch.tensor([[9.0, 9, 1, 5, 2, 7, 0, 9, 0]])
    kept = survivors(score, 5, recent=2, sink=1)[0]
    assert kept.nonzero().flatten().tolist() == [0, 1, 5, 7, 8]
    assert survivors(score, 9, 2, 1).all()


@given(window=st.integers(10, 200_000), sink=st.integers(0, 4))
def test_grid_spans_the_window(window: int, sink: int) -> None:
    grid = budget_grid(window, sink)
    assert grid.dtype == np.int32
    assert (grid[0], grid[-1]) == (sink + 1, window)
    assert (np.diff(grid) > 0).all()
    assert (np.diff(grid, 2) >= -1).all(), "dense at the small end"
