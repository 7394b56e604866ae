"""Running the plans: a context is read and cut, then every follow-up is asked of a fork of the cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompile.calibration import Episode, FollowUp
from kvcompile.evaluation.methods import Contender

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """One follow-up under one plan: `loss` of its judged tokens and `kl` to the full cache, nats a token; `exact`:
    every judged token was the likeliest. `share` of the full cache's bytes that the cache had resident."""

    method: str
    budget: str
    share: float
    family: str
    episode: int
    kind: str
    loss: float
    kl: float
    exact: bool


def evaluate(
    model: Any, episodes: Sequence[Episode], plans: Sequence[Contender], progress: Progress | None = None
) -> list[Row]:
    """Rows of the full cache first (method `full cache`), then of every plan; the model is as before afterwards.

    Prefill is exact for all plans, and a continuation is judged from its second token on, so every judged token is
    predicted from the compressed cache.
    """
    from transformers import DynamicCache

    from kvcompile.runtime import attach

    total, done = len(episodes) * (len(plans) + 1), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    rows: list[Row] = []
    # Distributions of all episodes would not fit: the plans take turns on each episode.
    for number, episode in enumerate(episodes):
        full: list[Tensor] = []
        ids = _ids(model, episode.context)
        cache: Any = DynamicCache(config=model.config)
        _read(model, ids, cache)
        for one in episode.follow_ups:
            said = _ask(model, one, copy.deepcopy(cache))
            rows.append(_row("full cache", "", 1.0, number, episode, one, said, said))
            full.append(said)
        del cache
        tick()
        for plan in plans:
            with attach(model, plan.artifact) as kv:
                cache = kv.new_cache()
                _read(model, ids, cache)
                account = plan.artifact.bytes
                share = cache.nbytes * plan.artifact.target.batch / account.full
                for one, before in zip(episode.follow_ups, full, strict=True):
                    said = _ask(model, one, copy.deepcopy(cache))
                    rows.append(_row(plan.method, plan.budget, share, number, episode, one, said, before))
            tick()
    order = {"full cache": 0}
    return sorted(rows, key=lambda row: order.get(row.method, 1))


def _ids(model: Any, tokens: Any) -> Tensor:
    return torch.as_tensor(tokens, device=model.device)[None]


@torch.inference_mode()
def _read(model: Any, ids: Tensor, cache: Any) -> None:
    model(ids, past_key_values=cache, logits_to_keep=1)


@torch.inference_mode()
def _ask(model: Any, one: FollowUp, cache: Any) -> Tensor:
    """Log-probabilities f32 [T, vocab] of every judged token."""
    keep = len(one.ids) - one.first
    logits = model(_ids(model, one.ids), past_key_values=cache, logits_to_keep=keep).logits[0, :-1]
    said: Tensor = logits.float().log_softmax(-1)
    return said


def _row(
    method: str, budget: str, share: float, number: int, episode: Episode, one: FollowUp, said: Tensor, full: Tensor
) -> Row:
    target = torch.as_tensor(one.ids[one.first + 1 :], device=said.device)
    loss = -said.gather(-1, target[:, None]).mean().item()
    kl = (full.exp() * (full - said)).sum(-1).mean().item()
    exact = bool((said.argmax(-1) == target).all())
    return Row(method, budget, share, episode.family, number, one.kind, loss, max(kl, 0.0), exact)
