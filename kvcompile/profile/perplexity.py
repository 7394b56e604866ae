"""Perplexity under a table of `recent` budgets, simulated with masks: BaKlaVa's parameter search asks for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.models.resident import in_turn, resident
from kvcompile.profile.attention import Attention, Handler, attended, causal, streaming
from kvcompile.profile.calls import Calls, embedded
from kvcompile.profile.layerwise import OnTheWay
from kvcompile.profile.structure import (
    embedding,
    frozen,
    head,
    head_blocks,
    layers,
    logits,
    place_of,
    source_layer,
)  # fmt: skip
from kvcompile.runtime.parts import planned


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
    handler = recent_handler(budgets, sink)
    calls, total = Calls(model), 0.0
    with torch.no_grad(), frozen(model), attended(model):
        with resident(embedding(model)):
            states = [embedded(model, ids) for ids in windows]
        runs = [OnTheWay(calls, ids, np.arange(len(ids)), one) for ids, one in zip(windows, states, strict=True)]
        for layer, _ in enumerate(in_turn(layers(model))):
            source = source_layer(model, layer)
            chosen = planned(layers(model)[source])
            attend = partial(_at, handler, place_of(model, source)) if chosen else causal
            states = [run.through(layer, state, attend) for run, state in zip(runs, states, strict=True)]
        with resident(head(model)):
            for ids, one in zip(windows, states, strict=True):
                total += _negative_log_likelihood(model, ids, one[0, :-1])
    return math.exp(total / sum(len(ids) - 1 for ids in windows))


def _at(handler: Handler, layer: int, call: Attention) -> Tensor:
    return handler(replace(call, layer=layer))


def _negative_log_likelihood(model: Any, ids: NDArray[np.int64], hidden: Tensor) -> float:
    """Summed over all tokens of `ids` [n] but the first, from the final states [n - 1, d] of those before them."""
    labels = torch.as_tensor(ids[1:], device=hidden.device)
    total = 0.0
    for block in head_blocks(model, len(hidden)):
        chosen = logits(model, hidden[block]).float().log_softmax(-1).gather(-1, labels[block, None])
        total -= chosen.double().sum().item()
    return total
