"""Losses with fitted values against attention written out, and what is told of other budgets from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvcompile.kernels import Changes, Softmax
from kvcompile.kernels.softmax import PLAIN
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, pack, references
from kvcompile.profile.cut import Left, over_cut
from kvcompile.profile.eviction import budget_grid
from kvcompile.profile.fitted import SHARE, Kept, points, with_fitted
from kvcompile.profile.losses import asked_of, effects, losses_between
from kvcompile.profile.references import LayerReferences
from kvcompile.stages import Rotary


class Asked:
    def __init__(self, kind: str, first: int, length: int) -> None:
        self.kind, self.first, self.ids = kind, first, np.zeros(length, np.int64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attended(query, keys, values, own_keys, own_values, scaling, softmax):
    """[G, m, D] of one head's follow-up over a context and itself, float64."""
    k, v = torch.cat([keys, own_keys]).double(), torch.cat([values, own_values]).double()
    rows = query.shape[1]
    seen = ~torch.ones(rows, len(k), dtype=torch.bool).triu(len(keys) + 1)
    return softmax.weights((query.double() @ k.mT * scaling)[None], seen)[0].double() @ v


@pytest.mark.parametrize("softmax", [PLAIN, Softmax(cap=3.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("group", [1, 5])
def test_losses_are_those_of_attention_written_out(group: int, softmax: Softmax) -> None:
    heads, length, dim, scaling = 2, 50, 4, 0.7
    keys, values = draw(heads, length, dim), draw(heads, length, dim, seed=1)
    packed = pack(length, [Asked("quote", 2, 9), Asked("question", 0, 5)])
    call = Attention(
        0, draw(heads * group, 14, dim, seed=2), draw(heads, 14, dim, seed=3), draw(heads, 14, dim, seed=4), scaling,
        None, softmax,
    )  # fmt: skip
    gradient = draw(heads * group, 14, dim, seed=5)
    asking = LayerReferences(draw(heads * group, 30, dim, seed=6), scaling, softmax)
    kept = [draw(heads, length, seed=7 + i) > level for i, level in enumerate((1.0, 0.0))]
    context = Context([], [keys], [values])
    looks = [asking.of_head(h, keys, values) for h in range(heads)]
    asked, nothing = asked_of(call, gradient, packed), torch.zeros(heads, length, 1, dtype=torch.int32)
    whole = effects(call, asked, context, Changes(nothing, 1))
    found = []
    for alive in kept:
        # As many tokens are kept in every head of a layer: here, one head after the other.
        each = []
        for h in range(heads):
            left = Kept.of(alive[h : h + 1], looks[h : h + 1]).context(keys[h : h + 1])
            one, mine = slice(h, h + 1), slice(h * group, (h + 1) * group)
            alone = Attention(0, call.query[mine], call.key[one], call.value[one], scaling, None, softmax)
            rows = asked_of(alone, gradient[mine], packed)
            all_kept = torch.zeros(1, left.keys[0].shape[1], 1, dtype=torch.int32)
            cut = effects(alone, rows, left, Changes(all_kept, 1))
            each.append(losses_between(packed, [replace(w, total=w.total[one]) for w in whole], cut))
        found.append({kind: np.concatenate([table[kind] for table in each]) for kind in each[0]})
    for block in packed.blocks:
        own, judged = slice(block.start, block.stop), slice(block.judged - block.start, None)
        for h in range(heads):
            rows = slice(h * group, (h + 1) * group)
            q, u, mine = call.query[rows, own], gradient[rows, own].double(), (call.key[h, own], call.value[h, own])
            full = attended(q, keys[h], values[h], *mine, scaling, softmax)
            for i, alive in enumerate(kept):
                new = looks[h].values(alive[h])
                assert torch.equal(new[~alive[h]], values[h][~alive[h]])
                cut = attended(q, keys[h][alive[h]], new[alive[h]], *mine, scaling, softmax)
                error = (u * (cut - full)).sum(-1).sum(0)[judged]
                expected = float(error.square().mean() / 2)
                np.testing.assert_allclose(found[i][block.kind][h], expected, rtol=2e-3, atol=1e-7)


def test_points_are_among_the_budgets() -> None:
    for window in (12, 200, 1216):
        budgets = budget_grid(window, 4)
        at = points(budgets)
        assert (np.diff(at) > 0).all()
        assert at[-1] < len(budgets)
    assert abs(int(budgets[points(budgets)][-1]) - 608) < 80


def test_other_budgets_change_as_much() -> None:
    budgets = budget_grid(1216, 4)
    at = points(budgets)
    loss = np.random.default_rng(0).uniform(0.1, 1, (2, 3, 4, len(budgets)))
    loss[..., -1] = 0
    fitted_loss = loss[..., SHARE, at] * 0.25
    found = with_fitted(loss, fitted_loss, budgets, np.array([False, True, True, True]))
    np.testing.assert_allclose(found[..., 1:, :], loss[..., 1:, :] * 0.25)
    assert np.array_equal(found[..., 0, :], loss[..., 0, :]), "policy `recent` fits nothing"
    # A power of the budget in between.
    fitted_loss[..., 1:] = loss[..., SHARE, at[1:]] * 0.5
    near = slice(at[0], at[1] + 1)
    between = (with_fitted(loss, fitted_loss, budgets, np.ones(4, bool)) / np.where(loss > 0, loss, 1))[..., 1, near]
    place = np.log(budgets[near] / budgets[at[0]]) / np.log(budgets[at[1]] / budgets[at[0]])
    np.testing.assert_allclose(between, np.broadcast_to(0.25 * 2**place, between.shape), rtol=1e-6)
    # No loss, no ratio.
    assert np.array_equal(with_fitted(np.zeros_like(loss), fitted_loss, budgets, np.ones(4, bool)), np.zeros_like(loss))


def test_a_plan_is_run_with_fitted_values() -> None:
    """What goes by the runtime's rule: heads of policy `scored` that evict, and no others."""
    heads, group, length, dim = 3, 2, 40, 8
    keys, values, score = draw(heads, length, dim), draw(heads, length, dim, seed=1), draw(heads, length, seed=2)
    read = Attention(0, draw(heads * group, length, dim, seed=3), keys, values, 0.5, None)
    left = Left(keys, values, score, references(read))
    rows = {
        "policy": np.array([4, 1, 4]), "capacity": np.array([12, 12, 40]), "sink": np.array([2, 2, 2]),
        "recent": np.array([4, 10, 4]), "k_bits": np.full(3, 32), "v_bits": np.full(3, 32),
    }  # fmt: skip
    packed = pack(length, [Asked("quote", 0, 5)])
    call = Attention(
        3, draw(heads * group, 5, dim, seed=4), draw(heads, 5, dim, seed=5), draw(heads, 5, dim, seed=6), 0.5, None
    )
    rotary = Rotary(np.zeros((1, dim), np.float32), np.arange(dim, dtype=np.int32))
    plain, fitted = (over_cut(left, packed, rows, None, length, turning)(call) for turning in (None, rotary))
    same = [torch.equal(a, b) for a, b in zip(plain.split(group), fitted.split(group), strict=True)]
    assert same == [False, True, True]


def test_references_are_those_of_the_runtime() -> None:
    call = Attention(0, draw(6, 50, 8), draw(2, 50, 8), draw(2, 50, 8), 0.5, None)
    found = references(call)
    assert found.shape == (6, 171, 8)
    assert torch.equal(found[:, 0], call.query[:, 0])
    assert torch.equal(found[:, -1], call.query[:, -1])
