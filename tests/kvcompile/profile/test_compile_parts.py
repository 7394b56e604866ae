"""The scorer, the transforms, and whether predictions hold for whole plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from kvcompile.artifacts import Quantiser
from kvcompile.kernels import decode, encode
from kvcompile.profile.attention import Attention
from kvcompile.profile.check import agreement
from kvcompile.profile.context import Context, pack
from kvcompile.profile.quantised import rounded
from kvcompile.profile.utility import fit, normal_sums, scores, utilities
from kvcompile.quantiser import balanced, spread

Tiny = Callable[..., Any]


class Asked:
    def __init__(self, kind: str, first: int, length: int) -> None:
        self.kind, self.first, self.ids = kind, first, np.zeros(length, np.int64)


@pytest.mark.parametrize("window", [None, 20])
def test_utility_is_the_largest_attention(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    length, sizes, firsts = 50, (9, 140), (3, 2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    context = Context([draw(length, 3)], [draw(2, length, 4)], [draw(2, length, 4)])
    packed = pack(length, [Asked("question", firsts[0], sizes[0]), Asked("replay", firsts[1], sizes[1])])
    total = sum(sizes)
    call = Attention(0, draw(6, total, 4), draw(2, total, 4), draw(2, total, 4), 0.8, window)
    found = utilities(call, context, packed)
    most = torch.zeros(2, length)
    for block in packed.blocks:
        keys = torch.cat([context.keys[0], call.key[:, block.start : block.stop]], 1).repeat_interleave(3, 0)
        weights = call.query[:, block.start : block.stop] @ keys.mT * 0.8
        rows = torch.arange(length, keys.shape[1])[:, None] - torch.arange(keys.shape[1])
        hidden = (rows < 0) | (rows >= (window or 10**6))
        p = weights.masked_fill(hidden, -torch.inf).softmax(-1)[:, block.judged - block.start :, :length]
        most = torch.maximum(most, p.view(2, 3, -1, length).amax((1, 2)))
    torch.testing.assert_close(found, most, rtol=1e-4, atol=1e-7)


def test_the_scorer_finds_a_linear_rule() -> None:
    generator = torch.Generator().manual_seed(1)
    rule, bias = torch.randn(2, 16, generator=generator) / 4, torch.tensor([-3.0, -6.0])
    squares, products = 0.0, 0.0
    for _ in range(4):
        hidden = torch.randn(200, 16, generator=generator)
        utility = (hidden @ rule.mT + bias).mT.exp()
        square, product = normal_sums(hidden, utility, (10, 190), 4)
        squares, products = squares + square, products + product
    scorer = fit(squares[None], products[None])
    hidden = torch.randn(50, 16, generator=generator)
    torch.testing.assert_close(scores(scorer, 0, hidden), (hidden @ rule.mT + bias).mT, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("size", [8, 16, 64, 72, 80, 96, 128])
def test_spreading_is_orthogonal_and_even(size: int) -> None:
    matrix = spread(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    assert np.abs(matrix).max() <= 2.0 / np.sqrt(size)


def test_balanced_transforms_reach_the_bound() -> None:
    """tr(T C T') tr(T^-T S T^-1) is least, (sum of roots of the eigenvalues of C S)^2."""
    rng = np.random.default_rng(0)
    stored, against = (a @ a.T + 0.5 * np.eye(16) for a in rng.standard_normal((2, 16, 16)))
    turn = balanced(stored, against)
    back = np.linalg.inv(turn)
    cost = np.trace(turn @ stored @ turn.T) * np.trace(back.T @ against @ back)
    least = np.sqrt(np.linalg.eigvals(stored @ against).real).sum() ** 2
    assert cost == pytest.approx(least, rel=1e-2)
    assert cost < np.trace(stored) * np.trace(against)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 64, 96])
def test_the_compiler_rounds_as_the_runtime_does(bits: int, size: int) -> None:
    rng = np.random.default_rng(0)
    turn = torch.tensor(balanced(np.diag(rng.uniform(0.1, 9, size)), np.eye(size)), dtype=torch.float32)
    mean, stored = torch.randn(size), torch.randn(7, size)
    found = rounded(stored, turn, mean, bits)
    turned = (stored - mean) @ turn.mT
    expected = decode(*encode(turned, bits), bits, torch.float32)
    expected[0] = turned[0]
    torch.testing.assert_close(found, expected @ torch.linalg.inv(turn).mT + mean, rtol=1e-4, atol=1e-4)


def test_balanced_rounding_beats_plain_rounding_where_it_matters() -> None:
    """Outlier channels that queries hardly look at ruin plain rounding."""
    rng = np.random.default_rng(0)
    scale = np.where(np.arange(64) % 16 == 3, 30.0, 1.0)
    keys = torch.tensor(rng.standard_normal((500, 64)) * scale, dtype=torch.float32)
    queries = torch.tensor(rng.standard_normal((200, 64)) / scale, dtype=torch.float32)
    turn = torch.tensor(balanced(np.cov(keys.T), np.cov(queries.T)), dtype=torch.float32)
    errors = [
        (queries @ (rounded(keys, matrix, torch.zeros(64), 4) - keys).mT).square().mean().item()
        for matrix in (torch.eye(64), turn)
    ]
    assert errors[1] < errors[0] / 20


def test_agreement_is_the_median_ratio_and_the_rank_correlation() -> None:
    """Plans below the noise, and a few whose losses do not add up, leave the factor alone."""
    predicted = np.geomspace(1e-4, 1e-1, 12)
    ratio = np.array([90, 80, 70, 60, 3, 2, 4, 3, 2, 4, 50, 60])
    checks = np.stack([predicted, ratio * predicted], axis=1)
    factor, correlation = agreement(checks)
    assert factor == pytest.approx(3.5)
    assert correlation == pytest.approx(spearmanr(*checks.T).statistic)
    assert agreement(np.zeros((12, 2)))[0] == 1.0


def test_quantisers_have_every_table() -> None:
    assert set(Quantiser.__dataclass_fields__) == {"key_transform", "key_mean", "value_transform", "value_mean"}
