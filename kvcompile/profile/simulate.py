"""The real KL of a plan: a forward pass in which the context has been cut and quantised as the runtime would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcompile.artifacts import POLICIES, Quantiser, Scorer
from kvcompile.kernels.codecs import CODECS
from kvcompile.profile.context import Context, Packed, follow, over_context, pack, read_context
from kvcompile.profile.eviction import survivors
from kvcompile.profile.quantised import Shift, matrices, quantised
from kvcompile.profile.setting import Episode
from kvcompile.profile.structure import Tick, frozen, logits
from kvcompile.profile.utility import scores
from kvcompile.quantiser import for_context
from kvcompile.stages import Parts, Plan, Problem

ROWS = 64
"""Judged rows of a follow-up at which distributions are compared."""


@dataclass(frozen=True)
class Reference:
    """A context, its follow-ups, and the model's final states with its full cache at the rows compared: a list over
    follow-ups of (kind, rows, [T, hidden_size]). Log-probabilities are made anew for every plan, as they would take
    more memory than everything else."""

    context: Context
    packed: Packed
    final: list[tuple[str, Tensor, Tensor]]


def reference(model: Any, context: Context, packed: Packed, tick: Tick = lambda _: None) -> Reference:
    """Run the follow-ups over the full cache."""
    places = [
        (b.kind, torch.from_numpy(np.linspace(b.judged, b.stop - 1, min(ROWS, b.stop - b.judged)).round().astype(int)))
        for b in packed.blocks
    ]
    final = follow(model, context, packed, over_context(context, packed), tick).final
    return Reference(context, packed, [(kind, rows, final[rows]) for kind, rows in places])


def divergence(
    model: Any,
    known: Reference,
    plan: Plan,
    scorer: Scorer | None,
    quantiser: Quantiser | None,
    tokens: int,
    tick: Tick = lambda _: None,
    shift: Shift | None = None,
) -> dict[str, float]:
    """Mean KL to the full cache by kind of follow-up, in nats a token, under a plan for contexts of `tokens` tokens,
    whose budgets are scaled to the length of this one, and whose keys are quantised at the positions after `shift`."""
    cut = apply_plan(known.context, plan, scorer, quantiser, tokens, shift)
    final = follow(model, known.context, known.packed, over_context(cut.context, known.packed, cut.kept), tick).final
    found: dict[str, list[float]] = {}
    for kind, rows, states in known.final:
        before, after = _log_probabilities(model, states), _log_probabilities(model, final[rows])
        # KL(full || cut) = sum_y p (log p - log q), mean over rows
        found.setdefault(kind, []).append((before.exp() * (before - after)).sum(-1).mean().item())
    return {kind: float(np.mean(values)) for kind, values in found.items()}


@dataclass(frozen=True)
class Cut:
    """A context with quantised keys and values, and by layer which tokens are kept, bool [H, n] (None: all)."""

    context: Context
    kept: list[Tensor | None]


def apply_plan(
    context: Context,
    plan: Plan,
    scorer: Scorer | None,
    quantiser: Quantiser | None,
    tokens: int,
    shift: Shift | None = None,
) -> Cut:
    """What a plan leaves of a context; token policies are `full`, `recent` and `scored`."""
    length, scale = len(context), len(context) / tokens
    keys, values, kept = list(context.keys), list(context.values), list[Tensor | None]()
    for layer in range(len(keys)):
        keys[layer] = _read_back(keys[layer], plan.k_bits[layer], quantiser, layer, "key", shift)
        values[layer] = _read_back(values[layer], plan.v_bits[layer], quantiser, layer, "value")
        alive: list[Tensor] = []
        by_score = scores(scorer, layer, context.hidden[layer]) if scorer is not None else None
        for head in range(keys[layer].shape[0]):
            policy = POLICIES[plan.policy[layer, head]]
            sink = int(plan.sink[layer, head])
            budget = min(max(round(int(plan.capacity[layer, head]) * scale), sink + 1), length)
            recent = budget - sink
            if policy == "scored":
                recent = min(max(round(int(plan.recent[layer, head]) * scale), 1), budget - sink)
            # Without a scorer no head is `scored`, and all scores are equal.
            row = torch.zeros(1, length) if by_score is None else by_score[head : head + 1]
            alive.append(survivors(row.to(keys[layer].device), budget, recent, sink)[0])
        kept.append(torch.stack(alive))
    return Cut(replace(context, keys=keys, values=values), kept)


def _read_back(
    stored: Tensor, bits: Any, quantiser: Quantiser | None, layer: int, kind: str, shift: Shift | None = None
) -> Tensor:
    chosen = np.isin(bits, list(CODECS))
    if quantiser is None or not chosen.any():
        return stored
    transform, mean = matrices(quantiser, layer, kind, stored.device)
    read = quantised if shift is None else partial(shift.quantised, layer=layer)
    heads = [
        read(stored[h], transform=transform[h], mean=mean[h], bits=int(bits[h])).to(stored.dtype)
        if chosen[h]
        else stored[h]
        for h in range(len(stored))
    ]
    return torch.stack(heads)


@torch.no_grad()
def _log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    return logits(model, hidden).float().log_softmax(-1)


def plan_divergence(model: Any, episodes: Sequence[Episode], plan: Plan, parts: Parts, problem: Problem) -> float:
    """Mean measured KL of a plan for the problem's context over episodes, text and questions alike, in nats a token;
    `parts` are a profile with moments of keys, the scorer and the quantiser. Episodes are shorter than the context may
    be: they are taken to stand at places spread evenly over it."""
    found, tokens, keys = [], problem.context, parts.profile.keys
    assert keys is not None
    assert parts.quantiser is not None
    quantiser = for_context(parts.quantiser, keys, problem.limit.tolist(), tokens)
    with frozen(model):
        for number, episode in enumerate(episodes):
            context = read_context(model, episode.context)
            known = reference(model, context, pack(len(context), episode.follow_ups))
            room = max(tokens - len(context), 0)
            shift = Shift(keys.rotary, round(room * (number + 0.5) / len(episodes)))
            kinds = divergence(model, known, plan, parts.scorer, quantiser, tokens, shift=shift)
            found.append(((kinds["continuation"] + kinds["quote"]) / 2 + kinds["question"]) / 2)
    return float(np.mean(found))
