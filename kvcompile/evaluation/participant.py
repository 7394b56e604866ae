"""What takes part in an evaluation: a way to keep a context in fewer bytes, under a name and at a budget."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.calibration import FollowUp
from kvcompile.runtime import ReadPrompt


class Held(Protocol):
    """A context that has been read and compressed. Follow-ups are asked one by one, each as if alone; or one question
    is answered, and the context is used up."""

    def share(self, tokens: int) -> float:
        """Bytes resident when so many tokens have come after the context, as a share of the full cache's for it."""
        ...

    def ask(self, one: FollowUp) -> Tensor:
        """Log-probabilities f32 [T, vocab] of every judged token."""
        ...

    def answer(self, question: NDArray[np.int64], new_tokens: int, ends: set[int]) -> Tensor:
        """Greedy tokens i64 [n] after a question [m]: until one of `ends`, itself included, at most `new_tokens`."""
        ...


class Participant(Protocol):
    """`budget` is as it was asked for, "" where none was."""

    @property
    def method(self) -> str: ...
    @property
    def budget(self) -> str: ...
    def read(
        self, model: Any, context: NDArray[np.int64], before: ReadPrompt | None = None
    ) -> AbstractContextManager[Held]:
        """Read a context [n]; inside of the block it can be asked. Afterwards the model is as before. `before` is the
        same context as the model itself has read it, for whoever can go by that."""
        ...
