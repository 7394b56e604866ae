"""The job of profiling: items in order, each of which adds to sums that survive an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from kvcompile.artifacts.errors import ModelError
from kvcompile.models.resident import ahead, resident
from kvcompile.profile.held import Held, complaining
from kvcompile.profile.resume import Sums, load, save

Progress = Callable[[int, int], None]
"""Called with the work done and the work in all, in tokens x layers; what it raises stops the profile."""

SAVE_EVERY = 20.0
"""Seconds between two saves at least; a save that takes long comes less often."""


Add = Callable[[], None]


@dataclass(frozen=True)
class Item:
    """A step of profiling: `run` measures something, puts it among what is held, or returns a function that adds it to
    the sums; `part` is the part of the model whose weights that takes, `work` what it costs, in tokens x layers.

    An item may read all that those before it left, and must come to the same when it is run again.
    """

    run: Callable[[Sums, Held], Add | None]
    part: nn.Module | None = None
    work: int = 0


def run(
    items: Sequence[Item],
    fresh: Sums,
    held: Held,
    progress: Progress | None = None,
    store: Path | None = None,
) -> Sums:
    """The sums, from `fresh` on, over all items; those already in the folder `store` are not run again. `items` among
    the sums counts the finished ones. What is held goes once all are.

    Sums are float64 where they are small: an artifact holds float32 and float16 of them, and loses nothing more on the
    way, whatever the number of items.
    """
    sums: Sums = {"items": np.zeros((), np.int64), **fresh}
    if store is not None:
        sums = load(store, sums)
    finished = int(sums["items"])
    total = sum(item.work for item in items)
    done = sum(item.work for item in items[:finished])
    clock, torn = _Clock(), False
    with _Weights() as weights:
        try:
            for number in range(finished, len(items)):
                weights.bring(items, number)
                add = items[number].run(sums, held)
                torn = True
                if add is not None:
                    add()
                held.commit()
                # Counted with what it added, in one file: an interruption before the save repeats the whole item.
                sums["items"] += 1
                torn = False
                if store is not None and clock.due():
                    _save(store, sums, held)
                    clock.saved()
                done += items[number].work
                if progress is not None:
                    progress(done, total)
        except BaseException as error:
            held.roll_back()
            # Stopped by the user, say: what is finished is kept. A full disk would be no fuller for trying.
            if store is not None and int(sums["items"]) > finished and not torn and not isinstance(error, ModelError):
                _save(store, sums, held)
            raise
    if store is not None and finished < len(items):
        _save(store, sums, None)
    held.clear()
    return sums


def _save(store: Path, sums: Sums, held: Held | None) -> None:
    with complaining(store):
        if held is None:
            save(store, sums)
        else:
            held.save(lambda: save(store, sums))


class _Clock:
    """Says when a save is due: often enough to lose little, and rarely enough to take no more than a tenth."""

    def __init__(self) -> None:
        self._next = time.monotonic() + SAVE_EVERY
        self._asked = 0.0

    def due(self) -> bool:
        self._asked = time.monotonic()
        return self._asked >= self._next

    def saved(self) -> None:
        now = time.monotonic()
        self._next = now + max(SAVE_EVERY, 10 * (now - self._asked))


class _Weights:
    """The part of the model that is at work; those of items side by side stay."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._part: nn.Module | None = None

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def bring(self, items: Sequence[Item], number: int) -> None:
        part = items[number].part
        if part is self._part and number > 0:
            return
        self._stack.close()
        self._part = part
        self._stack.enter_context(resident(part))
        ahead(next((other.part for other in items[number:] if other.part not in (None, part)), None))
