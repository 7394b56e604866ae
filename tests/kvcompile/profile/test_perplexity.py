from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvcompile.profile.attention import Attention
from kvcompile.profile.perplexity import perplexity, recent_handler


def ids_of(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 61, length)


def test_full_budgets_are_the_models_own_perplexity(tiny: Callable[..., Any], family: str) -> None:
    model, windows = tiny(family), [ids_of(150), ids_of(60)]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                model(torch.as_tensor(ids)[None]).logits[0, :-1], torch.as_tensor(ids[1:]), reduction="sum"
            ).item()
            for ids in windows
        ]
    expected = np.exp(sum(losses) / (149 + 59))
    assert perplexity(model, windows, np.full((3, 2), 150, np.int32), 4) == pytest.approx(expected, rel=1e-4)


def test_smaller_budgets_change_it(tiny: Callable[..., Any]) -> None:
    model, windows = tiny(), [ids_of(150)]
    full = perplexity(model, windows, np.full((3, 2), 150, np.int32), 4)
    assert perplexity(model, windows, np.full((3, 2), 10, np.int32), 4) != pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("length", [5, 128, 300])
def test_each_head_sees_its_sinks_and_recent_tokens(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, length, 8, generator=generator)
    key, value = torch.randn(2, 2, length, 8, generator=generator)
    budgets, sink = [9, 40], 3
    output = recent_handler(np.array([budgets], np.int32), sink)(Attention(0, query, key, value, 0.5, None))
    place = torch.arange(length)
    for head in range(6):
        recent = budgets[head // 3] - sink
        kept = (place <= place[:, None]) & ((place < sink) | (place > place[:, None] - recent))
        weights = (query[head] @ key[head // 3].T * 0.5).masked_fill(~kept, -torch.inf).softmax(-1)
        torch.testing.assert_close(output[head], weights @ value[head // 3], rtol=1e-4, atol=1e-5)
