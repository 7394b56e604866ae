"""Running the participants: a context is read and cut, then every follow-up is asked of what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompile.calibration import Episode, FollowUp
from kvcompile.evaluation.caches import FullCache
from kvcompile.evaluation.participant import Participant

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
    model: Any, episodes: Sequence[Episode], plans: Sequence[Participant], progress: Progress | None = None
) -> list[Row]:
    """Rows of the full cache first (method `full cache`), then of every plan; the model is as before afterwards.

    Prefill is exact for all plans, and a continuation is judged from its second token on, so every judged token is
    predicted from the compressed cache.
    """
    first: list[Row] = []
    rows: list[Row] = []
    whole = FullCache()
    total, done = len(episodes) * (len(plans) + 1), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    # Distributions of all episodes would not fit: the plans take turns on each episode.
    for number, episode in enumerate(episodes):
        with whole.read(model, episode.context) as held:
            full = [held.ask(one) for one in episode.follow_ups]
        first += [
            _row(whole, 1.0, number, episode, one, said, said)
            for one, said in zip(episode.follow_ups, full, strict=True)
        ]
        tick()
        for plan in plans:
            with plan.read(model, episode.context) as compressed:
                for one, before in zip(episode.follow_ups, full, strict=True):
                    said = compressed.ask(one)
                    rows.append(_row(plan, compressed.share(len(one.ids)), number, episode, one, said, before))
            tick()
    return first + rows


def _row(
    plan: Participant, share: float, number: int, episode: Episode, one: FollowUp, said: Tensor, full: Tensor
) -> Row:
    target = torch.as_tensor(one.ids[one.first + 1 :], device=said.device)
    loss = -said.gather(-1, target[:, None]).mean().item()
    kl = (full.exp() * (full - said)).sum(-1).mean().item()
    exact = bool((said.argmax(-1) == target).all())
    return Row(plan.method, plan.budget, share, episode.family, number, one.kind, loss, max(kl, 0.0), exact)
