"""Perplexity under a table of `recent` budgets, simulated with masks: BaKlaVa's parameter search asks for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.profile.attention import Attention, Handler, attending, causal, streaming
from kvcompile.profile.structure import forward, frozen, head_blocks, logits


def recent_handler(budgets: NDArray[np.int32], sink: int) -> Handler:
    """Attention in which every KV head sees only its first `sink` tokens and its last `budget - sink`, itself included.

    `budgets` i32 [L, H] tokens, each above `sink`. A layer whose sliding window is shorter than the sequence keeps it.
    """

    def attend(call: Attention) -> Tensor:
        num_kv_heads, length, _ = call.key.shape
        if call.sliding:
            return causal(call)
        group = len(call.query) // num_kv_heads
        # Heads of one budget share a mask, so they attend together.
        output = torch.empty_like(call.query)
        for budget in np.unique(budgets[call.layer]):
            heads = np.flatnonzero(budgets[call.layer] == budget)
            queries = (heads[:, None] * group + np.arange(group)).ravel()
            softmax, query = call.softmax.of(heads, group), call.query[queries]
            part = replace(call, query=query, key=call.key[heads], value=call.value[heads], softmax=softmax)
            output[queries] = causal(part) if budget >= length else streaming(part, sink, int(budget) - sink)
        return output

    return attend


def perplexity(model: Any, windows: Sequence[NDArray[np.int64]], budgets: NDArray[np.int32], sink: int) -> float:
    """exp of the mean negative log-likelihood over all tokens of `windows` (i64 [n] each) but their first, when every
    KV head attends only to what a `recent` budget (i32 [L, H] tokens, sinks included) would have kept."""
    total, count = 0.0, 0
    with frozen(model), attending(model, recent_handler(budgets, sink)):
        for ids in windows:
            total += _negative_log_likelihood(model, ids)
            count += len(ids) - 1
    return math.exp(total / count)


@torch.no_grad()
def _negative_log_likelihood(model: Any, ids: NDArray[np.int64]) -> float:
    hidden = forward(model, ids).final[:-1]
    labels = torch.as_tensor(ids[1:], device=hidden.device)
    total = 0.0
    for block in head_blocks(model, len(hidden)):
        chosen = logits(model, hidden[block]).float().log_softmax(-1).gather(-1, labels[block, None])
        total -= chosen.double().sum().item()
    return total
