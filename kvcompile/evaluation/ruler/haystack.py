"""What needles are hidden in: one line over and over, or essays."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

from kvcompile.calibration.authored import families_in
from kvcompile.calibration.user import user_family

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""A line of noise, RULER's own."""

DEPTHS = 40
"""Evenly spaced places, from the beginning of an essay to its end, at which RULER puts needles."""

SENTENCE_END = re.compile(r"(?<=[.!?]) ")

Documents = tuple[Callable[[], str], ...]


def held_out_documents() -> Documents:
    """The prose of ours that no calibration reads: essays, conversations and papers."""
    return tuple(one for family in families_in(files("kvcompile.evaluation") / "texts") for one in family.documents)


def essay_documents(path: Path | None) -> Documents:
    """The user's text at `path`, or ours.

    Raises:
        CalibrationError: a path without usable text.
    """
    return held_out_documents() if path is None else user_family(path).documents


def essay(rng: random.Random, count: int, documents: Documents) -> list[str]:
    """The sentences of so many words from the documents in random order, which are repeated as often as it takes."""
    order = rng.sample(documents, len(documents))
    words = list(itertools.islice(itertools.cycle(_words(order)), count))
    return SENTENCE_END.split(" ".join(words))


def _words(documents: Sequence[Callable[[], str]]) -> Iterator[str]:
    for document in documents:
        yield from document().split()


def hide_in_essay(rng: random.Random, needles: Sequence[str], sentences: Sequence[str]) -> str:
    """Running text with every needle between two sentences, at one of DEPTHS places."""
    depths = rng.sample(range(DEPTHS), len(needles))
    places = [len(sentences) * depth // (DEPTHS - 1) for depth in depths]
    return " ".join(_inserted(needles, places, sentences))


def hide_in_lines(rng: random.Random, needles: Sequence[str], lines: Sequence[str], ordered: bool = False) -> str:
    """Lines with every needle on one of its own, anywhere; `ordered`: in the order in which they are given."""
    places = [rng.randrange(len(lines) + 1) for _ in needles]
    return "\n".join(_inserted(needles, sorted(places) if ordered else places, lines))


def _inserted(needles: Sequence[str], places: Sequence[int], hay: Sequence[str]) -> Iterator[str]:
    """Needle i before straw `places[i]`, or after the last one; where several have one place, in their order."""
    at: dict[int, list[str]] = {}
    for needle, place in zip(needles, places, strict=True):
        at.setdefault(place, []).append(needle)
    for i, straw in enumerate(hay):
        yield from at.get(i, ())
        yield straw
    yield from at.get(len(hay), ())
