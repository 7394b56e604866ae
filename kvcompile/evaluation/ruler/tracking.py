"""Variable tracking: a chain of assignments hidden in noise, and all variables with its value asked for (vt)."""

from __future__ import annotations

import random
import string

from kvcompile.evaluation.ruler.haystack import NOISE, hide_in_lines
from kvcompile.evaluation.ruler.sample import Setting, Text

HOPS = 4
"""Assignments of a variable to the next one; a chain has one variable more."""

CONTEXT = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{haystack}"
QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
PREFIX = (
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are:"
)
"""RULER's template (arXiv 2404.06654)."""

EXAMPLE_LINES = 10
"""Of noise in the worked example, whose names have three letters; those of the chain proper have five."""


def track(rng: random.Random, units: int, setting: Setting) -> Text:
    """One chain of HOPS hops in `units` lines of noise, after a worked example of one as long."""
    example = _chain(rng, EXAMPLE_LINES, letters=3)
    text = _chain(rng, units, letters=5)
    worked = f"{example.context}{example.question} {example.prefix} {' '.join(example.expected)}\n\n"
    return Text(worked + text.context, text.question, text.prefix, text.expected)


def _chain(rng: random.Random, units: int, letters: int) -> Text:
    names = _names(rng, HOPS + 1, letters)
    value = str(rng.randrange(10_000, 100_000))
    values = [value, *(f"VAR {name}" for name in names)]
    assignments = [f"VAR {name} = {given}" for name, given in zip(names, values, strict=False)]
    hidden = hide_in_lines(rng, assignments, [NOISE] * units, ordered=True)
    return Text(
        CONTEXT.format(haystack=hidden), QUESTION.format(value=value), PREFIX.format(count=len(names), value=value),
        tuple(names),
    )  # fmt: skip


def _names(rng: random.Random, count: int, letters: int) -> list[str]:
    found: dict[str, None] = {}  # in the order in which they were drawn
    while len(found) < count:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(found)
