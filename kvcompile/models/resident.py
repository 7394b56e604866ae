"""Weights that are there only while they are needed.

A model that is held whole needs none of this: `resident` then does nothing. A streamed one registers a source for each
of its parts (`kvcompile.models.streamed`), which brings the part's weights in and gives them up again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn


class Source(Protocol):
    """Where the weights of one part of a model come from."""

    def bring(self) -> None:
        """Put the weights into the part."""

    def release(self) -> None:
        """Take them out again."""

    def ahead(self) -> None:
        """Have them read, so that bringing them takes less time; no more than a hint."""


_sources: WeakKeyDictionary[nn.Module, Source] = WeakKeyDictionary()
_users: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def register(part: nn.Module, source: Source) -> None:
    """Have the weights of `part` come from `source` whenever the part is used: around each of its forward passes, and
    for as long as a `resident` block lasts."""
    _sources[part] = source
    part.register_forward_pre_hook(lambda module, _: _enter(module), prepend=True)
    part.register_forward_hook(lambda module, *_: _leave(module), always_call=True)


def is_streamed(part: nn.Module) -> bool:
    """Whether the weights of `part` come and go."""
    return part in _sources


@contextmanager
def resident(part: nn.Module | None) -> Iterator[None]:
    """Keep the weights of a part where they are used, for the length of the block."""
    if part is None or part not in _sources:
        yield
        return
    _enter(part)
    try:
        yield
    finally:
        _leave(part)


def ahead(part: nn.Module | None) -> None:
    """Have the weights of a part read that is used next."""
    if part is not None and part in _sources and not _users.get(part):
        _sources[part].ahead()


def in_turn(parts: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """One part after the other, each resident while it is looked at and the next one read ahead."""
    several = list(parts)
    for part, following in zip(several, [*several[1:], None], strict=True):
        with resident(part):
            ahead(following)
            yield part


def _enter(part: nn.Module) -> None:
    if not _users.get(part):
        _sources[part].bring()
    _users[part] = _users.get(part, 0) + 1


def _leave(part: nn.Module) -> None:
    if not _users.get(part):
        return  # it could not be brought in
    _users[part] -= 1
    if not _users[part]:
        _sources[part].release()
