"""The job of profiling: items in order, each of which adds to sums that survive an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kvcompile.artifacts.errors import ModelError
from kvcompile.models.resident import ahead, resident
from kvcompile.profile.held import Held, LostError, complaining
from kvcompile.profile.lock import alone
from kvcompile.profile.ranks import Ranks
from kvcompile.profile.resume import FILE, Sums, load, save

Progress = Callable[[int, int], None]
"""Called with the work done and the work in all, in tokens x layers; what it raises stops the profile."""

ALONE = Ranks()

SAVE_EVERY = 20.0
"""Seconds between two saves at least; a save that takes long comes less often."""


Additions = Sequence[tuple[str, Any, Any]]
"""What is added to the sums: their names, where in them, and the numbers."""


@dataclass(frozen=True)
class Item:
    """A step of profiling: `run` measures something, puts it among what is held, or returns what is to be added to the
    sums; `part` is the part of the model whose weights that takes, `work` what it costs, in tokens x layers.

    An item may read all that those before it left, and must come to the same when it is run again. Of several processes
    the one that owns the number `owner` runs it, and what it holds, items of the same owner find; without an owner all
    run it, after they have met and before they meet again. Sums are complete where processes have met: at such items,
    wherever the part changes, and before an item that `meets`.
    """

    run: Callable[[Sums, Held], Additions | None]
    part: nn.Module | None = None
    work: int = 0
    owner: int | None = 0
    meets: bool = False


def run(
    items: Sequence[Item],
    fresh: Sums,
    held: Held,
    progress: Progress | None = None,
    store: Path | None = None,
    ranks: Ranks = ALONE,
    waiting: Callable[[], None] | None = None,
) -> Sums:
    """The sums, from `fresh` on, over all items; those already in the folder `store` are not run again. `items` among
    the sums counts the finished ones. What is held goes once all are. Where some of it is lost that unfinished sums
    need, they start from `fresh` again.

    Of several calls with one store, the others wait for the first to end; `waiting` is called before that.

    Sums are float64 where they are small: an artifact holds float32 and float16 of them, and loses nothing more on the
    way, whatever the number of items.
    """
    with _alone(store, ranks, waiting):
        start = partial(_Job, items, {"items": np.zeros((), np.int64), **fresh}, held, store, ranks)
        job = start()
        try:
            job.go(progress)
            lost = False
        except LostError:
            lost = job.forget()
            if not lost:
                raise
        if lost:  # Not among what the error still holds.
            job = start()
            job.go(progress)
        held.clear()
    return job.sums


@contextmanager
def _alone(store: Path | None, ranks: Ranks, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Have `store` for these processes alone within the block; the first of them sees to it for all."""
    if store is None:
        yield
        return
    with ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(alone(store, waiting)))
        yield


class _Job:
    def __init__(self, items: Sequence[Item], fresh: Sums, held: Held, store: Path | None, ranks: Ranks) -> None:
        self.items, self.held, self.store, self.ranks = items, held, store, ranks
        # What each process holds is on disk apart, so that unfinished sums belong to a number of processes.
        self.file = FILE if ranks.count == 1 else f"sums-{ranks.count}.npz"
        self.sums = fresh if store is None else self._kept(store, fresh)
        self.resumed = self.sums is not fresh
        self.pending: list[tuple[int, Additions]] = []
        self.clock, self.torn = _Clock(), False

    def go(self, progress: Progress | None) -> None:
        items, finished = self.items, int(self.sums["items"])
        total = sum(item.work for item in items)
        done = sum(item.work for item in items[:finished])
        with _Weights(items, self.ranks) as weights:
            try:
                for number in range(finished, len(items)):
                    if _runs(items[number], self.ranks):
                        weights.bring(number)
                        additions = items[number].run(self.sums, self.held) or ()
                        # What all have come to is added once.
                        if items[number].owner is not None or self.ranks.rank == 0:
                            self.pending.append((number, additions))
                    self.held.commit()
                    if self._meeting(number + 1):
                        self._meet(number + 1)
                    done += items[number].work
                    if progress is not None:
                        progress(done, total)
            except BaseException as error:
                self.held.roll_back()
                # Stopped by the user, say: what is finished is kept. A full disk would be no fuller for trying.
                saved = isinstance(error, ModelError) or self.torn or self.pending or self.ranks.count > 1
                if self.store is not None and int(self.sums["items"]) > finished and not saved:
                    self._save(self.store)
                raise
        if self.store is not None and finished < len(items):
            self._finish(self.store)

    def forget(self) -> bool:
        """Give up sums that cannot be gone on from, with what is held; whether they can be started from the beginning
        here and now. Other processes are in the midst of them, and have to be started again."""
        if self.store is None or not self.resumed:
            return False
        (self.store / self.file).unlink(missing_ok=True)
        self.held.clear()
        return self.ranks.count == 1

    def _kept(self, store: Path, fresh: Sums) -> Sums:
        kept = load(store, fresh)
        finished = int(kept["items"]) == len(self.items)
        return kept if finished or self.file == FILE else load(store, fresh, self.file)

    def _meeting(self, number: int) -> bool:
        """Whether all processes meet before the item of this number."""
        if self.ranks.count == 1 or number == len(self.items):
            return True
        before, after = self.items[number - 1], self.items[number]
        return before.part is not after.part or after.meets or None in (before.owner, after.owner)

    def _meet(self, number: int) -> None:
        """Add what the items up to `number` came to, in their order, and save it if it is time."""
        told = self.ranks.gather((self.pending, self.clock.due()))
        self.torn = True
        for _, additions in sorted((one for pending, _ in told for one in pending), key=lambda one: one[0]):
            for name, where, value in additions:
                self.sums[name][where] += value
        # Counted with what they added, in one file: an interruption before the save repeats the items.
        self.sums["items"][...] = number
        self.pending, self.torn = [], False
        if self.store is not None and told[0][1]:
            self._save(self.store)
            self.clock.saved()

    def _save(self, store: Path) -> None:
        with complaining(store):
            self.held.save(lambda: self.ranks.first(lambda: save(store, self.sums, self.file)))

    def _finish(self, store: Path) -> None:
        def act() -> None:
            save(store, self.sums)
            if self.file != FILE:
                (store / self.file).unlink(missing_ok=True)

        with complaining(store):
            self.ranks.first(act)


def _runs(item: Item, ranks: Ranks) -> bool:
    return item.owner is None or ranks.owns(item.owner)


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

    def __init__(self, items: Sequence[Item], ranks: Ranks) -> None:
        self._parts = [item.part if _runs(item, ranks) else None for item in items]
        self._stack = ExitStack()
        self._part: nn.Module | None = None

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def bring(self, number: int) -> None:
        part = self._parts[number]
        if part is self._part and part is not None:
            return
        self._stack.close()
        self._part = part
        self._stack.enter_context(resident(part))
        ahead(next((other for other in self._parts[number:] if other not in (None, part)), None))
