"""The job of profiling: the items of all stages in order, each added to sums that survive an interruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kvcompile.profile.resume import Sums, load, save
from kvcompile.profile.structure import Tick

Progress = Callable[[int, int], None]
"""Called with the work done and the work in all, in tokens x layers; what it raises stops the profile."""


class Stage(Protocol):
    """A stage of measuring: items (an episode, a probe) that each add to sums. It may read the sums of the stages
    before it, which are complete when its first item comes."""

    @property
    def work(self) -> Sequence[int]:
        """The work of every item, in tokens x layers."""

    def fresh(self) -> Sums:
        """This stage's share of the sums, all zero: it says their names, shapes and dtypes."""

    def add(self, sums: Sums, number: int, tick: Tick) -> None:
        """Measure an item and add what it gives to the sums, in place; `tick` is told of the work as it is done."""


def run(stages: Sequence[Stage], progress: Progress | None = None, store: Path | None = None) -> Sums:
    """The sums over all items of all stages, those already in the folder `store` not measured again. `items` counts the
    finished ones.

    Sums are float64 where they are small: an artifact holds float32 and float16 of them, and loses nothing more on the
    way, whatever the number of items.
    """
    items = [(stage, number, work) for stage in stages for number, work in enumerate(stage.work)]
    sums: Sums = {"items": np.zeros((), np.int64)}
    for stage in stages:
        sums |= stage.fresh()
    if store is not None:
        sums = load(store, sums)
    finished = int(sums["items"])
    total = sum(work for _, _, work in items)
    done = sum(work for _, _, work in items[:finished])

    def tick(units: int) -> None:
        nonlocal done
        done += units
        if progress is not None:
            progress(done, total)

    for stage, number, _ in items[finished:]:
        stage.add(sums, number, tick)
        # Counted with what it added, in one file: an interruption before the save repeats the whole item.
        sums["items"] += 1
        if store is not None:
            save(store, sums)
    return sums
