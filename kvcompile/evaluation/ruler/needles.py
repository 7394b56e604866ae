"""Needles in a haystack: sentences that give keys a value, and the values of some of them asked for (NIAH)."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvcompile.evaluation.ruler.haystack import NOISE, essay, hide_in_essay, hide_in_lines
from kvcompile.evaluation.ruler.keys import KINDS
from kvcompile.evaluation.ruler.sample import Setting, Text

NEEDLE = "One of the special magic {kind} for {key} is: {value}."

ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{haystack}",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    "The special magic {kind} for {query} mentioned in the provided text is",
)
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{haystack}",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    "The special magic {kind} for {query} mentioned in the provided text are",
)
"""RULER's templates (arXiv 2404.06654) for one and for several values: context, question, answer prefix."""


@dataclass(frozen=True)
class Needles:
    """Writes a haystack of `noise` lines, of the words of an `essay`, or of `needles` with keys that are not asked for.

    In it are `keys` keys of kind `key` with `values` values each of kind `value` (`words`, `numbers` or `uuids`), of
    which `queries` keys are asked for. No key and no number comes twice.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __call__(self, rng: random.Random, units: int, setting: Setting) -> Text:
        keys = KINDS[self.key](rng, self.keys)
        values = KINDS[self.value](rng, self.keys * self.values)
        own = [values[i * self.values : (i + 1) * self.values] for i in range(self.keys)]
        asked = rng.sample(range(self.keys), self.queries)
        needles = [self._needle(key, value) for key, row in zip(keys, own, strict=True) for value in row]
        rng.shuffle(needles)

        if self.haystack == "essay":
            hidden = hide_in_essay(rng, needles, essay(rng, units, setting.documents))
        elif self.haystack == "noise":
            hidden = hide_in_lines(rng, needles, [NOISE] * units)
        else:
            others = zip(_others(self.key, rng, units, keys), _others(self.value, rng, units, values), strict=True)
            hidden = hide_in_lines(rng, needles, [self._needle(key, value) for key, value in others])

        single = self.queries * self.values == 1
        words = {"kind": self.value.removesuffix("s") if single else self.value, "query": _listed(keys, asked)}
        context, question, prefix = (part.format(haystack=hidden, **words) for part in (ONE if single else SEVERAL))
        return Text(context, question, prefix, tuple(value for i in asked for value in own[i]))

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value, key=key, value=value)


def _others(kind: str, rng: random.Random, count: int, taken: list[str]) -> list[str]:
    return [one for one in KINDS[kind](rng, count + len(taken)) if one not in taken][:count]


def _listed(keys: list[str], asked: list[int]) -> str:
    *most, last = (keys[i] for i in asked)
    return f"{', '.join(most)}, and {last}" if most else last
