"""From answers to one line a plan: the mean score of every task, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kvcompile.evaluation.ruler.run import Answered


@dataclass(frozen=True)
class Scores:
    """One plan: its method, the budget asked for, the share of the full cache's bytes, the mean score of every task's
    samples, from 0 to 100, and the mean over tasks."""

    method: str
    budget: str
    share: float
    tasks: dict[str, float]
    average: float


def summarise_scores(answers: Sequence[Answered]) -> list[Scores]:
    """One line a plan: the full cache, the artifact, then by budget and average."""
    plans: dict[tuple[str, str], dict[str, list[Answered]]] = {}
    for one in answers:
        plans.setdefault((one.method, one.budget), {}).setdefault(one.task, []).append(one)
    found = []
    for (method, budget), tasks in plans.items():
        means = {task: fmean(one.score for one in part) for task, part in tasks.items()}
        share = next(iter(tasks.values()))[0].share
        found.append(Scores(method, budget, share, means, fmean(means.values())))

    def place(one: Scores) -> tuple[bool, bool, float, float]:
        return one.method != "full cache", one.budget != "", -round(one.share, 3), -one.average

    return sorted(found, key=place)
