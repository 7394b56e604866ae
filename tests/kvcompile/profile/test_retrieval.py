from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import heads_of
from kvcompile.profile.attention import Attention, attending, causal
from kvcompile.profile.retrieval import layer_score, retrieval, scaled
from kvcompile.profile.structure import attention_layers, forward


@dataclass(frozen=True)
class Question:
    prompt_ids: NDArray[np.int64]
    answer_ids: NDArray[np.int64]
    needles: tuple[tuple[int, int], ...]


def scores(model: Any, question: Question) -> list[NDArray[np.float64]]:
    """The scores of all layers, [H] each, from one forward pass."""
    found = []

    def attend(call: Attention) -> Tensor:
        found.append(layer_score(call, question))
        return causal(call)

    with attending(model, attend):
        forward(model, np.concatenate([question.prompt_ids, question.answer_ids[:-1]]))
    return found


def test_retrieval_by_the_papers_formula() -> None:
    attention = torch.tensor([0.30, 0.25, 0.02, 0.02, 0.10, 0.08, 0.06, 0.05, 0.04, 0.03, 0.02, 0.015, 0.015])
    needle = torch.zeros(13, dtype=torch.bool)
    needle[[1, 7, 11]] = True
    # The top ten are all but three places of 0.02 and less, of which one is the needle's.
    wtp, wfn = 0.25 + 0.05, 0.015
    wfp = attention.topk(10).values.sum().item() - wtp
    precision, recall = wtp / (wtp + wfp), wtp / (wtp + wfn)
    expected = 2 * precision * recall / (precision + recall)
    assert retrieval(attention, needle).item() == pytest.approx(expected, rel=1e-5)


def test_retrieval_spans_zero_to_one() -> None:
    attention = torch.eye(20)[:2]
    needle = torch.zeros(20, dtype=torch.bool)
    needle[0] = True
    assert retrieval(attention, needle).tolist() == [1.0, 0.0]


def test_rows_are_those_that_predict_the_answer(tiny: Callable[..., Any], family: str, monkeypatch: Any) -> None:
    model = tiny(family)
    ids = np.random.default_rng(0).integers(3, 61, 46)
    question = Question(ids[:40], ids[40:], ((5, 9), (30, 33)))
    got = scores(model, question)
    monkeypatch.setattr("kvcompile.profile.retrieval.BLOCK", 4)
    for again, before in zip(scores(model, question), got, strict=True):
        np.testing.assert_allclose(again, before, atol=1e-6)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.as_tensor(ids[:-1])[None], output_attentions=True)
    needle = torch.zeros(45, dtype=torch.bool)
    needle[5:9] = needle[30:33] = True
    for layer, score, attention in zip(attention_layers(model), got, out.attentions, strict=True):
        by_head = retrieval(attention[0, :, 39:45].double(), needle).mean(-1)
        num_kv_heads, _ = heads_of(model.config, layer.self_attn.layer_idx)
        np.testing.assert_allclose(score, by_head.view(num_kv_heads, -1).mean(-1).numpy(), atol=1e-5)


def test_scaled_to_the_unit_interval() -> None:
    np.testing.assert_allclose(scaled(np.array([[2.0, 4.0], [3.0, 6.0]])), [[0, 0.5], [0.25, 1]])
    assert (scaled(np.full((2, 2), 0.3)) == 0).all()
