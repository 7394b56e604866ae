"""Retrieval probes: facts hidden in a long text, and a question whose answer only they give (for SurfaceLogicKV)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.calibration.family import Family, Stream, opening, token_ids

KINDS = ("direct", "reasoning")

COLOURS = (
    "amber", "azure", "bronze", "cobalt", "copper", "coral", "crimson", "ebony", "emerald", "golden", "indigo", "ivory",
    "jade", "lilac", "maroon", "ochre", "olive", "pearl", "russet", "scarlet", "silver", "teal", "umber", "violet",
)  # fmt: skip
THINGS = (
    "anchor", "basalt", "bridge", "candle", "cedar", "comet", "falcon", "fjord", "garden", "glacier", "harbour",
    "island", "kettle", "lantern", "meadow", "orchard", "otter", "pebble", "quarry", "raven", "saddle", "temple",
    "thistle", "willow",
)  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """A question about a text. `prompt_ids` i64 [n]: text with facts and the question; `answer_ids` i64 [m]: its right
    continuation; `needles`: the half-open ranges of `prompt_ids` that hold the facts; `kind`: one of KINDS."""

    kind: str
    prompt_ids: NDArray[np.int64] = field(compare=False)
    answer_ids: NDArray[np.int64] = field(compare=False)
    needles: tuple[tuple[int, int], ...]


def draw_probes(tokenizer: Any, families: Sequence[Family], length: int, count: int, seed: int) -> list[Probe]:
    """`count` probes, in turn direct (one fact holds the number) and reasoning (one fact names the key of the other),
    with prompts of `length` tokens, or a little more where that is too few for facts and question.

    The facts lie at random depths of text of the families in turn; text that is used up is served again.
    """
    return [
        _probe(
            tokenizer, families[number % len(families)], KINDS[number % len(KINDS)], length, f"{seed}:probe {number}"
        )
        for number in range(count)
    ]


def _probe(tokenizer: Any, family: Family, kind: str, length: int, seed: str) -> Probe:
    rng = random.Random(seed)
    facts, question, answer = _facts(kind, rng)
    needles = [token_ids(tokenizer, f"\n{fact}\n") for fact in facts]
    asked = token_ids(tokenizer, f"\n\n{question}")
    # The answer as it continues the question, which not every tokenizer splits as it would alone.
    answered = token_ids(tokenizer, f"\n\n{question} {answer}")[len(asked) :]
    bos = opening(tokenizer)

    room = max(length - len(bos) - len(asked) - sum(map(len, needles)), len(needles) + 1)
    haystack = np.resize(Stream(tokenizer, family, seed).take(room), room)
    depths = sorted(rng.sample(range(1, room), len(needles)))
    pieces, spans = [bos], list[tuple[int, int]]()
    shift = len(bos)
    for depth, hay, needle in zip(depths, np.split(haystack, depths), needles, strict=False):
        pieces += [hay, needle]
        spans.append((shift + depth, shift + depth + len(needle)))
        shift += len(needle)
    pieces += [haystack[depths[-1] :], asked]
    return Probe(kind, np.concatenate(pieces), answered, tuple(spans))


def _facts(kind: str, rng: random.Random) -> tuple[list[str], str, str]:
    """Facts in random order, the start of a sentence that they complete, and what completes it."""
    colours, things = rng.sample(COLOURS, 2), rng.sample(THINGS, 2)
    first, second = (f"{colour}-{thing}" for colour, thing in zip(colours, things, strict=True))
    number = str(rng.randrange(1_000_000, 10_000_000))
    if kind == "direct":
        sentence = f"The special magic number for {first} is"
        return [f"{sentence} {number}."], f"What is the special magic number for {first}? {sentence}", number
    facts = [f"The secret partner of {first} is {second}.", f"The special magic number for {second} is {number}."]
    rng.shuffle(facts)
    sentence = f"The special magic number for the secret partner of {first} is"
    return facts, f"What is the special magic number for the secret partner of {first}? {sentence}", number
