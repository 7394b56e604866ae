"""What a task is, the text that it writes, and the sample that becomes of it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Setting:
    """What tasks write from: the `length` in tokens that context, question and answer may have together, and the
    `documents` of essay haystacks, each read when it is called."""

    length: int
    documents: tuple[Callable[[], str], ...]


@dataclass(frozen=True)
class Text:
    """A user's message in two parts, `context` and `question`, the `prefix` with which the answer begins, and the
    strings that are `expected` in what follows."""

    context: str
    question: str
    prefix: str
    expected: tuple[str, ...]


Write = Callable[[random.Random, int, Setting], Text]
"""A text whose haystack has so many units (sentences, words or needles); what is hidden in it and asked for is drawn
first, so that it does not depend on their number."""


@dataclass(frozen=True)
class Task:
    """How a task's texts are written, with at `least` and at `most` so many units, and the tokens of an answer."""

    write: Write
    new_tokens: int
    least: int = 1
    most: int = sys.maxsize


@dataclass(frozen=True)
class Sample:
    """One text as token ids: `context` i64 [n] is read and its cache cut to the budget, then comes the rest, `question`
    i64 [m], which ends with the answer's prefix, and at most `new_tokens` tokens are answered. `asked` is the question
    in words."""

    task: str
    number: int
    context: NDArray[np.int64] = field(compare=False, repr=False)
    question: NDArray[np.int64] = field(compare=False, repr=False)
    asked: str
    expected: tuple[str, ...]
    new_tokens: int
