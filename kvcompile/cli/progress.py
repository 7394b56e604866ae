"""Progress on stderr: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kvcompile.cli import output
from kvcompile.stages import Report

LINE_SECONDS = 30.0
"""Time between two lines of a stage, where stderr is no terminal."""


@contextmanager
def stages() -> Iterator[Report]:
    """A function (stage, done, total) that shows how far a stage is; a total of 0 is one that is not known."""
    if output.stderr.is_terminal:
        with _bars() as report:
            yield report
    else:
        with _lines() as lines:
            yield lines.report


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show that something is under way whose progress is not known; without a terminal, only if it takes long."""
    if output.stderr.is_terminal:
        with output.stderr.status(what):
            yield
    else:
        with _lines() as lines:
            lines.begin(what, quietly=True)
            yield


class Lines:
    """A line when a stage begins, and one every `LINE_SECONDS` while it lasts.

    `write` is given the lines; `clock` gives seconds. `report` may be called as often as one likes; `tick` is called by
    a thread, so that lines come on time however long a step takes.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._started: dict[str, float] = {}
        self._stage: str | None = None
        self._done, self._total, self._next = 0, 0, 0.0
        self._lock = threading.Lock()

    def begin(self, stage: str, quietly: bool = False) -> None:
        """Enter a stage; `quietly`: its first line comes after `LINE_SECONDS`."""
        with self._lock:
            self._begin(stage, quietly)

    def report(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` (0: not known) in a stage, which begins with its first report."""
        with self._lock:
            if stage != self._stage:
                self._begin(stage, quietly=stage in self._started)
            self._done, self._total = done, total

    def tick(self) -> None:
        """Write the line that is due, if one is."""
        with self._lock:
            now = self._clock()
            if self._stage is None or now < self._next:
                return
            while self._next <= now:
                self._next += LINE_SECONDS
            far = f"{self._done / self._total:.0%}, " if self._total else ""
            self._write(f"{self._stage}: {far}{now - self._started[self._stage]:.0f} s so far")

    def _begin(self, stage: str, quietly: bool) -> None:
        now = self._clock()
        self._stage, self._done, self._total = stage, 0, 0
        self._started.setdefault(stage, now)
        self._next = now + LINE_SECONDS
        if not quietly:
            self._write(f"{stage} ...")


@contextmanager
def _lines() -> Iterator[Lines]:
    lines, finished = Lines(lambda line: click.echo(line, err=True)), threading.Event()

    def tick() -> None:
        while not finished.wait(1.0):
            lines.tick()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        finished.set()
        thread.join()


@contextmanager
def _bars() -> Iterator[Report]:
    """One bar a stage."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output.stderr, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield report
