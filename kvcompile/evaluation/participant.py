"""What takes part in an evaluation: a way to keep a context in fewer bytes, under a name and at a budget."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.calibration import FollowUp
from kvcompile.runtime import ReadPrompt


class Held(Protocol):
    """A context that has been read and compressed. Follow-ups are asked one by one, each as if alone."""

    def share(self, tokens: int) -> float:
        """Bytes resident when so many tokens have come after the context, as a share of the full cache's for it."""
        ...

    def ask(self, one: FollowUp) -> Tensor:
        """Log-probabilities f32 [T, vocab] of every judged token."""
        ...


@dataclass(frozen=True)
class Question:
    """After a `context` i64 [n], `ids` i64 [m] are asked, and at most `new_tokens` greedy tokens answer. `before` is
    the context as the model itself has read it, for whoever can go by that. `found` is what a participant knows of the
    context that others like it need too, by a name of theirs."""

    context: NDArray[np.int64]
    ids: NDArray[np.int64]
    new_tokens: int
    before: ReadPrompt | None = None
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """Greedy tokens i64 [n] until one that ends an answer, itself included, and the `share` of the full cache's bytes
    that were resident then."""

    tokens: Tensor
    share: float


class Participant(Protocol):
    """`budget` is as it was asked for, "" where none was. The model is as before after either call."""

    @property
    def method(self) -> str: ...
    @property
    def budget(self) -> str: ...
    def read(self, model: Any, context: NDArray[np.int64]) -> AbstractContextManager[Held]:
        """Read a context [n]; inside of the block it can be asked."""
        ...

    def answer(self, model: Any, questions: Sequence[Question], ends: set[int]) -> list[Answer]:
        """What is said to each question, whose answer ends with one of `ends`."""
        ...


def until(tokens: Tensor, new_tokens: int, ends: set[int]) -> Tensor:
    """Of greedy tokens i64 [n] those up to the first of `ends`, itself included, at most `new_tokens`."""
    length = next((i + 1 for i, token in enumerate(tokens.tolist()) if token in ends), len(tokens))
    return tokens[: min(length, new_tokens)]
