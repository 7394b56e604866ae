"""The real KL of a plan: a forward pass in which the context has been cut and quantised as the runtime would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import Quantiser, Scorer
from kvcompile.models.resident import in_turn, resident
from kvcompile.profile.attention import attended
from kvcompile.profile.calls import Calls, embedded
from kvcompile.profile.context import Context, Packed, follow, judged, over_context, pack
from kvcompile.profile.cut import Left, over_cut, rows_of
from kvcompile.profile.layerwise import OnTheWay, after, read_layer
from kvcompile.profile.linear import tensors_of
from kvcompile.profile.quantised import Shift
from kvcompile.profile.rotation import of_layer
from kvcompile.profile.setting import Episode
from kvcompile.profile.structure import (
    Tick,
    embedding,
    frozen,
    head,
    head_blocks,
    layers,
    lends,
    logits,
    place_of,
    source_layer,
)  # fmt: skip
from kvcompile.profile.utility import scores
from kvcompile.quantiser import for_context
from kvcompile.runtime.parts import planned
from kvcompile.stages import Parts, Plan, Problem, Rotary

ROWS = 64
"""Judged rows of a follow-up at which distributions are compared."""

Rows = list[tuple[str, Tensor]]
"""By follow-up: its kind, and the packed rows at which distributions are compared."""


def compared(packed: Packed) -> Rows:
    """Evenly spread judged rows of every follow-up but its last, where it has another: what comes after an answer is no
    part of it, and can be half of what a short one loses."""
    told = (replace(block, stop=max(block.stop - 1, block.judged + 1)) for block in packed.blocks)
    return [(block.kind, judged(block, ROWS)) for block in told]


def kinds(model: Any, states: Sequence[tuple[str, Tensor, Sequence[Tensor]]]) -> list[dict[str, float]]:
    """Mean KL by kind of follow-up, in nats a token, of every other cache: from (kind, final states [T, d] with the
    full cache, and with each of the others). Log-probabilities are made a few rows at a time, as those of all would
    take more memory than everything else."""
    found: list[dict[str, list[float]]] = [{} for _ in states[0][2]]
    for kind, full, others in states:
        lost = torch.empty(len(others), len(full))
        for block in head_blocks(model, len(full)):
            before = _log_probabilities(model, full[block])
            shares = before.exp()
            for i, other in enumerate(others):
                # KL(full || other) = sum_y p (log p - log q), mean over rows
                lost[i, block] = (shares * (before - _log_probabilities(model, other[block]))).sum(-1).cpu()
        for one, mean in zip(found, lost.mean(1).tolist(), strict=True):
            one.setdefault(kind, []).append(mean)
    return [{kind: float(np.mean(values)) for kind, values in one.items()} for one in found]


@dataclass(frozen=True)
class Reference:
    """A context, its follow-ups, and the model's final states [m, d] with its full cache."""

    context: Context
    packed: Packed
    final: Tensor


def reference(model: Any, context: Context, packed: Packed, tick: Tick = lambda _: None) -> Reference:
    """Run the follow-ups over the full cache."""
    return Reference(context, packed, follow(model, context, packed, over_context(context, packed), tick).final)


def divergence(
    model: Any,
    known: Reference,
    plan: Plan,
    scorer: Scorer | None,
    quantiser: Quantiser | None,
    tokens: int,
    tick: Tick = lambda _: None,
    shift: Shift | None = None,
    rotary: Rotary | None = None,
) -> dict[str, float]:
    """Mean KL to the full cache by kind of follow-up, in nats a token, under a plan for contexts of `tokens` tokens,
    whose budgets are scaled to the length of this one, and whose keys are quantised at the positions after `shift`;
    token policies are `full`, `recent` and `scored`. With the model's `rotary` embedding values are fitted as the
    runtime fits them."""
    context, handlers = known.context, []
    for layer, (key, value) in enumerate(zip(context.keys, context.values, strict=True)):
        score = None if scorer is None else scores(scorer, layer, context.hidden[layer])
        moved = None if shift is None else Shift(of_layer(shift.rotary, layer), shift.offset)
        left = Left(key, value, score, context.references[layer])
        of_one = None if quantiser is None else Quantiser(**_only(quantiser, layer))
        rows, turning = rows_of(plan, layer), None if rotary is None else of_layer(rotary, layer)
        handlers.append(over_cut(left, known.packed, rows, of_one, tokens, turning, moved))
    final = follow(model, context, known.packed, lambda call: handlers[call.layer](call), tick).final
    return kinds(model, [(kind, known.final[rows], [final[rows]]) for kind, rows in compared(known.packed)])[0]


@torch.no_grad()
def _log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    return logits(model, hidden).float().log_softmax(-1)


def plan_divergence(model: Any, episodes: Sequence[Episode], plan: Plan, parts: Parts, problem: Problem) -> float:
    """Mean measured KL of a plan for the problem's context over episodes, text and questions alike, in nats a token;
    `parts` are a profile with moments of keys, the scorer and the quantiser. Episodes are shorter than the context may
    be: they are taken to stand at places spread evenly over it. All go through a layer before the next is looked at."""
    tokens, keys = problem.context, parts.profile.keys
    assert keys is not None
    assert parts.quantiser is not None
    quantiser = for_context(parts.quantiser, keys, problem.limit.tolist(), tokens)
    calls, runs = Calls(model), []
    with torch.no_grad(), frozen(model), attended(model):
        with resident(embedding(model)):
            for number, episode in enumerate(episodes):
                packed = pack(len(episode.context), episode.follow_ups)
                room = max(tokens - len(episode.context), 0)
                offset = round(room * (number + 0.5) / len(episodes))
                ids = episode.context
                context = OnTheWay(calls, ids, np.arange(len(ids)), embedded(model, ids))
                asked = OnTheWay(calls, packed.ids, packed.positions, embedded(model, packed.ids))
                runs.append(_Run(packed, offset, context, asked, replace(asked, lent={})))
        for layer, part in enumerate(in_turn(layers(model))):
            source = source_layer(model, layer)
            place = place_of(model, source)
            for run in runs:
                if source == layer:
                    run.context, left = read_layer(model, part, run.context, run.reading.arguments(layer))
                else:
                    left = run.left[source]
                if lends(model, layer):
                    run.left[layer] = left
                attend = whole = over_context(left, run.packed)
                if planned(layers(model)[source]) and not problem.fixed[place]:
                    score = None
                    if parts.scorer is not None:
                        score = scores(Scorer(**_only(parts.scorer, place)), 0, left.hidden[0])
                    rotary = of_layer(keys.rotary, place)
                    of_one, rows = Quantiser(**_only(quantiser, place)), rows_of(plan, place)
                    kept = Left(left.keys[0], left.values[0], score, left.references[0])
                    shift = Shift(rotary, run.offset)
                    attend = over_cut(kept, run.packed, rows, of_one, tokens, rotary, shift)
                with after(model, part, run.packed, tensors_of(left.states, part)):
                    run.full = run.asked.through(layer, run.full, whole)
                    run.cut = run.asked_of_cut.through(layer, run.cut, attend)
        with resident(head(model)):
            found = [_mean(kinds(model, run.compared())[0]) for run in runs]
    return float(np.mean(found))


@dataclass
class _Run:
    """An episode on its way through the layers: its context, and what is asked with the full cache and with the cut
    one, with the residual streams [1, n, d] of all three; and by number of the layer what the context has `left` for
    later ones."""

    packed: Packed
    offset: int
    reading: OnTheWay
    asked: OnTheWay
    asked_of_cut: OnTheWay
    left: dict[int, Context] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.context, self.full, self.cut = self.reading.embedded, self.asked.embedded, self.asked_of_cut.embedded

    def compared(self) -> list[tuple[str, Tensor, list[Tensor]]]:
        return [(kind, self.full[0, rows], [self.cut[0, rows]]) for kind, rows in compared(self.packed)]


def _only(tables: Scorer | Quantiser, layer: int) -> dict[str, NDArray[Any]]:
    """A scorer's or a quantiser's tables of one layer, [1, ...] each."""
    return {name: table[layer, None] for name, table in vars(tables).items()}


def _mean(kinds: dict[str, float]) -> float:
    """Text and questions alike."""
    return ((kinds["continuation"] + kinds["quote"]) / 2 + kinds["question"]) / 2
