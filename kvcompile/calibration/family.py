"""A kind of text and the documents it consists of, read only when they are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SEPARATOR = "\n\n"
"""Between the documents of one passage."""


@dataclass(frozen=True)
class Family:
    """Text of one kind. Each call in `documents` reads one document; their order is fixed."""

    name: str
    documents: tuple[Callable[[], str], ...]


class Stream:
    """Token ids of a family's documents, without special tokens, in an order drawn from a seed; no token comes twice.

    Every passage begins with a fresh document while there is one, for variety; after that the unused ends are served.
    """

    def __init__(self, tokenizer: Any, family: Family, seed: str) -> None:
        self._tokenizer = tokenizer
        self._fresh = list(family.documents)
        random.Random(f"{seed}:{family.name}").shuffle(self._fresh)
        self._ends: list[NDArray[np.int64]] = []

    def take(self, count: int) -> NDArray[np.int64]:
        """The next `count` token ids, i64 [count]; fewer only when the text is used up."""
        taken: list[NDArray[np.int64]] = []
        missing = count
        while missing > 0 and (self._fresh or self._ends):
            ids = self._next_document() if self._fresh else self._ends.pop()
            taken.append(ids[:missing])
            if len(ids) > missing:
                self._ends.append(ids[missing:])
            missing -= len(taken[-1])
        return np.concatenate([*taken, np.empty(0, np.int64)])

    def _next_document(self) -> NDArray[np.int64]:
        text = self._fresh.pop()()
        return token_ids(self._tokenizer, text + SEPARATOR if text else "")


def token_ids(tokenizer: Any, text: str) -> NDArray[np.int64]:
    """Token ids of a text without special tokens, i64 [n]."""
    # Not verbose: a document may well be longer than the model's context, it is cut afterwards.
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int64)


def opening(tokenizer: Any) -> NDArray[np.int64]:
    """What the tokenizer puts before a plain text: the BOS token, i64 [1], or nothing, i64 [0]."""
    ids = tokenizer("a").input_ids
    has_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return np.asarray(ids[:1] if has_bos else [], dtype=np.int64)
