"""Word lists: the most common words of one asked for (cwe), and of a text in code (fwe)."""

from __future__ import annotations

import math
import random
import re
import string
from functools import cache

from kvcompile.evaluation.ruler.haystack import held_out_documents
from kvcompile.evaluation.ruler.keys import ADJECTIVES, NOUNS, PAIRS, pair
from kvcompile.evaluation.ruler.sample import Setting, Text

COMMON = 10
"""Words that are asked for."""

SHORT = 4096
"""Tokens; in shorter contexts RULER repeats words less often."""

CWE_CONTEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{haystack}"
)
CWE_QUESTION = f"\nQuestion: What are the {COMMON} most common words in the above list?"
CWE_PREFIX = f"Answer: The top {COMMON} words that appear most often in the list are:"
FWE_CONTEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {haystack}"
)
FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
FWE_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"
"""RULER's templates (arXiv 2404.06654)."""

ALPHA = 2.0
ZETA = math.pi**2 / 6
"""Riemann's zeta function of ALPHA: by Zeta's distribution, a word of rank k has the share k^-ALPHA / ZETA."""
LETTERS = 6
"""Of a coded word."""
LEAST_CODED = 80
"""Below it, the third and the fourth of the coded words may come equally often."""


def common_words(rng: random.Random, units: int, setting: Setting) -> Text:
    """A numbered list of COMMON words, each 30 times, and of `units` others, each 3 times, after a worked example; in
    contexts of less than SHORT tokens 6 times and once."""
    often, seldom, example_often, example_seldom, example = (
        (30, 3, 10, 3, 30) if setting.length >= SHORT else (6, 1, 3, 1, 10)
    )
    drawn = _drawn(rng, 2 * COMMON + example + units)
    first, answer, others = drawn[:COMMON], drawn[COMMON : 2 * COMMON], drawn[2 * COMMON :]
    worked = CWE_CONTEXT.format(haystack=_listed(rng, first, example_often, others[:example], example_seldom))
    listed = CWE_CONTEXT.format(haystack=_listed(rng, answer, often, others[example:], seldom))
    context = f"{worked}{CWE_QUESTION} {CWE_PREFIX} {_numbered(first)}\n{listed}"
    return Text(context, CWE_QUESTION, CWE_PREFIX, tuple(answer))


def frequent_words(rng: random.Random, units: int, setting: Setting) -> Text:
    """`units` coded words, how often each comes given by Zeta's distribution; the first rank is dots, the next three
    are asked for. There are a fiftieth as many different ones as the context may have tokens."""
    different = max(setting.length // 50, 10)
    counts = [int(units * rank**-ALPHA / ZETA) for rank in range(1, different + 1)]
    coded: dict[str, None] = {"...": None}
    while len(coded) < different:
        coded["".join(rng.choices(string.ascii_lowercase, k=LETTERS))] = None
    names = list(coded)
    text = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    return Text(FWE_CONTEXT.format(haystack=" ".join(text)), FWE_QUESTION, FWE_PREFIX, tuple(names[1:4]))


@cache
def _vocabulary() -> tuple[str, ...]:
    """Single words: those that keys are made of, and longer ones of our held-out prose."""
    prose = (word for document in held_out_documents() for word in re.findall(r"\b[a-z]{5,12}\b", document()))
    return tuple(dict.fromkeys([*ADJECTIVES, *NOUNS, *prose]))


def _drawn(rng: random.Random, count: int) -> list[str]:
    """Different words in random order; pairs of words once single ones do not suffice."""
    single = _vocabulary()
    words = rng.sample(single, len(single))  # all of them, so that the first ones are the same whatever the count
    pairs = rng.sample(range(PAIRS), max(count - len(single), 0))
    return [*words, *map(pair, pairs)][:count]


def _listed(rng: random.Random, common: list[str], often: int, others: list[str], seldom: int) -> str:
    words = common * often + others * seldom
    rng.shuffle(words)
    return _numbered(words)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
