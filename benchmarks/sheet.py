"""What a check of a machine found: a line of JSON a row, written as it comes, inside a budget of seconds.

No row is lost when the run is cut, and none is measured twice when the run goes on after one that took the process
with it.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOST_DEVICE = 75
"""Exit status of a process whose GPU takes no more work after an error."""
SLACK, LEAST = 3, 90.0
"""A row is given up after so many times what it was expected to take, and so many seconds at least."""


@dataclass(frozen=True)
class Found:
    """What a row's work found: in words, whether that is what was asked for (None: nothing was), and numbers."""

    measured: str
    met: bool | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of the sheet. `error`: why nothing was found. `took`: seconds of the row; `at`: since the start."""

    check: str
    measured: str
    asked: str
    met: bool | None
    error: str
    detail: Mapping[str, Any]
    took: float
    at: float

    @property
    def line(self) -> str:
        word = {True: "met", False: "NOT MET", None: ""}[self.met]
        asked = f" (asked for: {self.asked})" if self.asked else ""
        return f"{self.check}: {self.error or self.measured}{asked} {word}".rstrip()


class Sheet:
    """Rows that are appended to `path`. `start` and `deadline` are seconds of the wall clock; without `judges`, as in a
    dry run, what was measured is compared with nothing."""

    def __init__(self, path: Path, start: float, deadline: float, *, judges: bool = True) -> None:
        self.path, self.start, self.deadline, self.judges = path, start, deadline, judges
        self.rows = {row.check: row for row in read(path)}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def measure(
        self, check: str, work: Callable[[], Found], *, asked: str = "", seconds: float = 10, memory: int = 0
    ) -> Mapping[str, Any] | None:
        """Do a row's work, unless it takes more `seconds` or bytes of the GPU's `memory` than are left, and hand on the
        numbers; None where there are none. Where something is asked for, what is skipped is not met."""
        if check in self.rows:
            return self.rows[check].detail or None
        begun, met = time.time(), False if asked and self.judges else None
        if self.left < seconds:
            why = f"skipped: {max(self.left, 0):.0f} s left, needs about {seconds:.0f} s"
            self._add(Row(check, "", asked, met, why, {}, 0, begun - self.start))
            return None
        if memory and memory > (free := free_memory()):
            why = f"skipped: needs {memory / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            self._add(Row(check, "", asked, met, why, {}, 0, begun - self.start))
            return None
        # In a dry run everything may take its time: the machine may have other work.
        limit = min(begun + max(SLACK * seconds, LEAST), self.deadline) if self.judges else self.deadline
        self.path.with_suffix(".now").write_text(json.dumps({"check": check, "asked": asked, "limit": limit}))
        try:
            found = work()
        except Exception as error:  # a row that fails is a row
            why, error.__traceback__ = one_line(error), None  # which holds what the work had allocated
            self._add(
                Row(check, "", asked, False if self.judges else met, why, {}, time.time() - begun, begun - self.start)
            )
            clean_up()
            return None
        met = found.met if self.judges else None
        self._add(Row(check, found.measured, asked, met, "", found.detail, time.time() - begun, begun - self.start))
        return found.detail or None

    def judge(self, check: str, measured: str, asked: str, met: bool) -> None:
        """A row about what other rows have measured."""
        self.measure(check, lambda: Found(measured, met), asked=asked, seconds=-math.inf)

    def missing(self, check: str, asked: str, why: str) -> None:
        """A row about what could not be measured, as another row has failed or been skipped."""
        if check not in self.rows:
            self._add(Row(check, "", asked, False if self.judges else None, why, {}, 0, time.time() - self.start))

    def note(self, check: str, measured: str, detail: Mapping[str, Any] | None = None) -> None:
        """A row that says something and measures nothing."""
        self.measure(check, lambda: Found(measured, None, detail or {}), seconds=-math.inf)

    def _add(self, row: Row) -> None:
        self.rows[row.check] = row
        append(self.path, row)
        self.path.with_suffix(".now").unlink(missing_ok=True)
        print(row.line, flush=True)


def append(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(row), default=str) + "\n")


def read(path: Path) -> list[Row]:
    """Of a sheet that was cut in the middle of a line, all before it."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(Row(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def free_memory() -> float:
    """Bytes that can still be had on the GPU, with what torch holds and does not use; without a GPU, no end of them."""
    import torch

    if not torch.cuda.is_available():
        return math.inf
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return float(torch.cuda.mem_get_info()[0] + unused)


def clean_up() -> None:
    """Give back memory, and end the process if the GPU takes no more work: another one goes on after this row."""
    gc.collect()
    if "torch" not in sys.modules or not (torch := sys.modules["torch"]).cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the GPU takes no more work: {one_line(error)}", flush=True)
        os._exit(LOST_DEVICE)  # an orderly end would give memory back, which fails
