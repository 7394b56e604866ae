"""What takes part in an evaluation: a way to keep a context in fewer bytes, under a name and at a budget."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from kvcompile.calibration import Episode, FollowUp


class Held(Protocol):
    """A context that has been read and compressed. Follow-ups are asked one by one, each as if alone."""

    def share(self, one: FollowUp) -> float:
        """Bytes resident while the follow-up is asked, as a share of the full cache's for the context."""
        ...

    def ask(self, one: FollowUp) -> Tensor:
        """Log-probabilities f32 [T, vocab] of every judged token."""
        ...


class Participant(Protocol):
    """`budget` is as it was asked for, "" where none was."""

    @property
    def method(self) -> str: ...
    @property
    def budget(self) -> str: ...
    def read(self, model: Any, episode: Episode) -> AbstractContextManager[Held]:
        """Read the episode's context; inside of the block it can be asked. Afterwards the model is as before."""
        ...
