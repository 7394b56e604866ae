"""Utilities against attention written out, and the scorer that predicts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, pack
from kvcompile.profile.utility import fit_scorer, normal_sums, scores, utilities


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
    scorer = fit_scorer(squares[None], products[None])
    hidden = torch.randn(50, 16, generator=generator)
    torch.testing.assert_close(scores(scorer, 0, hidden), (hidden @ rule.mT + bias).mT, atol=0.05, rtol=0.02)
