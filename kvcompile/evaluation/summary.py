"""From rows to one line a plan: means over episodes with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcompile.evaluation.run import Row

KINDS = ("continuation", "quote", "question")


@dataclass(frozen=True)
class Measure:
    """Mean and standard error over episodes (None of one alone) of one kind of follow-up: loss and KL in nats a token;
    `exact`: the share answered without a mistake."""

    loss: float
    loss_error: float | None
    kl: float
    kl_error: float | None
    exact: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Summary:
    """One plan: its method, the budget asked for, the share of the full cache's bytes (the mean over rows, where what
    is asked takes bytes of its own), and what was measured."""

    method: str
    budget: str
    share: float
    kinds: dict[str, Measure]


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One summary a plan: the full cache, the artifact, then by budget and quality of the quotes."""
    plans: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        plans.setdefault((row.method, row.budget), []).append(row)
    found = [
        Summary(method, budget, _share(part), {kind: _measure([r for r in part if r.kind == kind]) for kind in KINDS})
        for (method, budget), part in plans.items()
    ]

    def place(one: Summary) -> tuple[bool, bool, float, float]:
        return one.method != "full cache", one.budget != "", -round(one.share, 3), one.kinds["quote"].kl

    return sorted(found, key=place)


def _share(rows: Sequence[Row]) -> float:
    shares = [row.share for row in rows]
    # The mean of equal numbers can differ from them in its last digit.
    return shares[0] if len(set(shares)) == 1 else float(np.mean(shares))


def _measure(rows: Sequence[Row]) -> Measure:
    episodes = sorted({row.episode for row in rows})
    loss = np.array([np.mean([r.loss for r in rows if r.episode == e]) for e in episodes])
    kl = np.array([np.mean([r.kl for r in rows if r.episode == e]) for e in episodes])
    error = math.sqrt(len(episodes))

    def spread(values: np.ndarray) -> float | None:
        return float(values.std(ddof=1)) / error if len(values) > 1 else None

    exact = float(np.mean([row.exact for row in rows]))
    return Measure(float(loss.mean()), spread(loss), float(kl.mean()), spread(kl), exact)
