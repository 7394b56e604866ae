"""Answering samples: with the full cache, then inside every plan's budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvcompile.evaluation.caches import FullCache, ids_of
from kvcompile.evaluation.participant import Participant, Question
from kvcompile.evaluation.ruler.sample import Sample
from kvcompile.evaluation.ruler.scoring import string_match_all

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answered:
    """One sample under one plan: what was said after the answer's prefix, and its score from 0 to 100; `share` of the
    full cache's bytes that the cache had resident."""

    method: str
    budget: str
    share: float
    task: str
    number: int
    asked: str
    expected: tuple[str, ...]
    answer: str
    score: float


def answer(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    plans: Sequence[Participant],
    progress: Progress | None = None,
    batch: int = 1,
) -> list[Answered]:
    """Every sample's answers, those of the full cache first (method `full cache`); the model is as before afterwards.

    A sample's context is read exactly, by the model itself and once for all plans that need no more than its keys and
    values, and each brings it down to its budget. Question and answer's prefix come to the compressed cache, which then
    takes greedy tokens as any other: until one that ends the answer, or as many as the task gives. A context is asked
    one question alone, so its cache needs no fork to be kept for another. What was read of `batch` samples is in memory
    at once, and plans that can answer these side by side.
    """
    from kvcompile.models import ending_tokens
    from kvcompile.runtime import read_prompt

    ends, everyone, found = ending_tokens(model, tokenizer), [FullCache(), *plans], list[Answered]()
    # The plans take turns on the samples of a batch: to attach one takes no time beside reading a context.
    for group in [samples[i : i + batch] for i in range(0, len(samples), batch)]:
        asked = [
            Question(one.context, one.question, one.new_tokens, read_prompt(model, ids_of(model, one.context)))
            for one in group
        ]
        for plan in everyone:
            for one, answered in zip(group, plan.answer(model, asked, ends), strict=True):
                said = tokenizer.decode(answered.tokens.tolist(), skip_special_tokens=True)
                of = one.task, one.number, one.asked, one.expected
                score = string_match_all(said, one.expected)
                found.append(Answered(plan.method, plan.budget, answered.share, *of, said, score))
            if progress is not None:
                progress(len(found), len(samples) * len(everyone))
    return found
