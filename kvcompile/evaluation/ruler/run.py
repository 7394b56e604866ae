"""Answering samples: with the full cache, then inside every plan's budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from kvcompile.artifacts import Artifact
from kvcompile.evaluation.methods import Contender
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
    model: Any, tokenizer: Any, samples: Sequence[Sample], plans: Sequence[Contender], progress: Progress | None = None
) -> list[Answered]:
    """Every sample's answers, those of the full cache first (method `full cache`); the model is as before afterwards.

    Each reads the sample's context once, exactly, and brings it down to its budget. Question and answer's prefix come
    to the compressed cache, which then takes greedy tokens as any other: until one that ends the answer, or as many as
    the task gives. A context is asked one question alone, so its cache needs no fork to be kept for another.
    """
    from kvcompile.models import ending_tokens

    ends, total, found = ending_tokens(model, tokenizer), len(samples) * (len(plans) + 1), list[Answered]()

    def note(method: str, budget: str, sample: Sample, share: float, new: torch.Tensor) -> None:
        said = tokenizer.decode(new[0].tolist(), skip_special_tokens=True)
        score = string_match_all(said, sample.expected)
        found.append(
            Answered(method, budget, share, sample.task, sample.number, sample.asked, sample.expected, said, score)
        )
        if progress is not None:
            progress(len(found), total)

    # The plans take turns on each sample: to attach one takes no time beside reading a context.
    for sample in samples:
        note("full cache", "", sample, 1.0, _with_full_cache(model, sample, ends))
        for plan in plans:
            note(plan.method, plan.budget, sample, *_inside(model, plan.artifact, sample, ends))
    return found


@torch.inference_mode()
def _with_full_cache(model: Any, sample: Sample, ends: set[int]) -> torch.Tensor:
    from transformers import DynamicCache

    from kvcompile.runtime import generate_full

    cache = DynamicCache(config=model.config)
    model(_ids(model, sample.context), past_key_values=cache, logits_to_keep=1)
    question = _ids(model, sample.question)
    return generate_full(model, cache, question, max_new_tokens=sample.new_tokens, eos=ends)


def _inside(model: Any, plan: Artifact, sample: Sample, ends: set[int]) -> tuple[float, torch.Tensor]:
    """The share of the full cache's bytes, and new tokens [1, n]."""
    from kvcompile.runtime import Decoder, attach, generate

    with attach(model, plan) as kv:
        cache = kv.new_cache()
        Decoder(model, cache).prefill(_ids(model, sample.context))
        share = cache.nbytes * plan.target.batch / plan.bytes.full
        question = _ids(model, sample.question)
        return share, generate(model, cache, question, max_new_tokens=sample.new_tokens, eos=ends)


def _ids(model: Any, tokens: NDArray[Any]) -> torch.Tensor:
    return torch.as_tensor(tokens, device=model.device)[None]
