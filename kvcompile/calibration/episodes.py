"""Episodes: a long context, and what is asked of a model after its cache has been compressed.

A context is a passage of one family with facts hidden in it. The follow-ups come after it, each as if alone: the text
goes on (`continuation`), a passage of the context is to be quoted (`quote`), a fact is asked for (`question`), and for
fitting the scorer a long part of it is repeated (`replay`; KVzip, arXiv 2505.23416, scores tokens so, chunk by chunk).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.calibration.family import Family, Stream, opening, token_ids
from kvcompile.calibration.probes import COLOURS, THINGS

CONTINUATION = 256
"""Tokens by which the text goes on."""
QUESTIONS = 3
QUOTES = 4
LEAD, QUOTED = 12, 64
"""Tokens of a quote that are given, and that are to follow."""

REPLAYED = 1024
"""Most tokens of a context that are repeated."""

REPLAY_PROMPT = "\n\nThis part of the text once more, word for word:\n\n"
QUOTE_PROMPTS = (
    "\n\nOne passage of the text above, exactly as it stands there:\n\n",
    "\n\nThe text says, and these are its own words:\n\n",
    "\n\nPlease copy the passage that begins as follows.\n\n",
    "\n\nQuoted from above: ",
)
FACTS = (
    ("The access code for {key} is {number}.", "Which access code belongs to {key}? The access code for {key} is"),
    ("Remember that {key} has the serial number {number}.", "What serial number does {key} have? It is"),
    ("The special magic number for {key} is {number}.", "What is the special magic number for {key}? Answer:"),
    ("Parcel {key} was sent to locker {number}.", "To which locker was parcel {key} sent? To locker"),
    ("{key}: {number}", "The entry for {key} in the text above reads {key}:"),
)
"""A sentence with a fact, and the question whose answer is its number."""


@dataclass(frozen=True)
class FollowUp:
    """`ids` i64 [m] after the context; the rows from `first` on are judged: what the model says there of the next
    token. `kind` is one of continuation, quote, question and replay."""

    kind: str
    first: int
    ids: NDArray[np.int64] = field(compare=False)


@dataclass(frozen=True)
class Episode:
    """`context` i64 [n] of one family, and its follow-ups; `replayed` is the half-open range of the context that a
    replay repeats, empty where there is none."""

    family: str
    context: NDArray[np.int64] = field(compare=False)
    follow_ups: tuple[FollowUp, ...]
    replayed: tuple[int, int] = (0, 0)


def draw_episodes(
    tokenizer: Any,
    families: Sequence[Family],
    length: int,
    count: int,
    seed: int,
    *,
    replay: bool,
    part: tuple[int, int] = (0, 1),
    quotes: int = QUOTES,
) -> list[Episode]:
    """`count` episodes, the families in turn, with contexts of `length` tokens and each with a continuation and
    questions; with `replay` up to 1024 tokens of the context are repeated, otherwise `quotes` are asked for.

    A family whose text does not fill a context and its continuation is served once more. Of `part` (i, n), only every
    n-th document from the i-th on is used, so that episodes for different purposes have no text in common; a family too
    small for that is used as a whole.
    """
    families = [_part(tokenizer, family, *part, length + CONTINUATION) for family in families]
    purpose = "replay" if replay else "quotes"
    streams = [Stream(tokenizer, family, f"{seed}:{purpose}") for family in families]
    return [
        _episode(
            tokenizer,
            families[number % len(families)],
            streams[number % len(families)],
            length,
            random.Random(f"{seed}:{purpose} {number}"),
            None if replay else quotes,
        )
        for number in range(count)
    ]


def _episode(
    tokenizer: Any, family: Family, stream: Stream, length: int, rng: random.Random, quotes: int | None
) -> Episode:
    """With so many quotes; None: with a replay."""
    facts, questions = _facts(tokenizer, rng, QUESTIONS)
    bos = opening(tokenizer)
    room = max(length - len(bos) - sum(map(len, facts)), len(facts) + 1)
    continuation = min(CONTINUATION, max(length // 4, 1))
    text = _passage(tokenizer, family, stream, room + continuation, rng)
    depths = sorted(rng.sample(range(1, room), len(facts)))
    pieces = [bos]
    for fact, part in zip(facts, np.split(text[:room], depths), strict=False):
        pieces += [part, fact]
    context = np.concatenate([*pieces, text[depths[-1] : room]])
    # The true continuation, as what a model says itself of a text that it has half forgotten would tell less.
    asked = [FollowUp("continuation", 0, text[room:]), *questions]
    if quotes is None:
        prompt = token_ids(tokenizer, REPLAY_PROMPT)
        start = rng.randrange(max(len(context) - REPLAYED, 0) + 1)
        stop = min(start + REPLAYED, len(context))
        asked.append(FollowUp("replay", len(prompt) - 1, np.concatenate([prompt, context[start:stop]])))
        return Episode(family.name, context, tuple(asked), (start, stop))
    asked += [_quote(tokenizer, context, prompt, rng) for prompt in QUOTE_PROMPTS[:quotes]]
    return Episode(family.name, context, tuple(asked))


def _part(tokenizer: Any, family: Family, first: int, step: int, least: int) -> Family:
    """Every `step`-th document, if they have `least` tokens; else all."""
    part = Family(family.name, family.documents[first::step])
    return part if len(Stream(tokenizer, part, "part").take(least)) == least else family


def _passage(tokenizer: Any, family: Family, stream: Stream, count: int, rng: random.Random) -> NDArray[np.int64]:
    text = stream.take(count)
    if len(text) < count:
        again = Stream(tokenizer, family, str(rng.random())).take(count)
        text = np.resize(np.concatenate([text, again]), count)
    return text


def _quote(tokenizer: Any, context: NDArray[np.int64], prompt: str, rng: random.Random) -> FollowUp:
    asked = token_ids(tokenizer, prompt)
    span = min(LEAD + QUOTED, len(context))
    start = rng.randrange(len(context) - span + 1)
    lead = min(LEAD, span // 2)
    return FollowUp("quote", len(asked) + lead - 1, np.concatenate([asked, context[start : start + span]]))


def _facts(tokenizer: Any, rng: random.Random, count: int) -> tuple[list[NDArray[np.int64]], list[FollowUp]]:
    facts, questions = [], []
    colours, things = rng.sample(COLOURS, count), rng.sample(THINGS, count)
    for colour, thing, (fact, question) in zip(colours, things, rng.sample(FACTS, count), strict=True):
        key, number = f"{colour}-{thing}", str(rng.randrange(1_000_000, 10_000_000))
        facts.append(token_ids(tokenizer, "\n" + fact.format(key=key, number=number) + "\n"))
        asked = token_ids(tokenizer, "\n\n" + question.format(key=key))
        # The answer as it continues the question, which not every tokenizer splits as it would alone.
        whole = token_ids(tokenizer, "\n\n" + question.format(key=key) + f" {number}")
        questions.append(FollowUp("question", len(asked) - 1, whole))
    return facts, questions
