"""Running a sheet in a process of its own, which a hang or a lost GPU may cost, and another one goes on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from sheet import LOST_DEVICE, Row, append, read

LEAST = 20
"""Seconds that must be left for another process to be worth its start."""
GRACE = 5
"""Seconds after a limit until the process is ended."""


def supervise(command: Sequence[str], path: Path, start: float, deadline: float) -> None:
    """Run `command`, which appends to the sheet at `path`, until it is through or time is up; it is started again after
    every row that it did not survive, which becomes a row of the sheet."""
    while True:
        before = len(read(path))
        why = _run(command, path, deadline)
        if why is None:
            return
        now = _under_way(path)
        # A process that lost its GPU has written the row itself.
        if now and now["check"] not in {row.check for row in read(path)}:
            row = Row(now["check"], "", now["asked"], False, why, {}, 0, time.time() - start)
            append(path, row)
            print(row.line, flush=True)
        elif len(read(path)) == before:  # it would do so for ever
            append(path, Row("the process", "", "ends by itself", False, why, {}, 0, time.time() - start))
            return
        if time.time() > deadline - LEAST:
            return


def finish(path: Path) -> int:
    """Print what was not met; the exit status."""
    rows = read(path)
    path.with_suffix(".now").unlink(missing_ok=True)
    failed = [row for row in rows if row.met is False]
    print(f"\n{len(rows)} rows in {path}, {sum(row.met is True for row in rows)} met, {len(failed)} not met")
    for row in failed:
        print(f"  {row.line}")
    return int(bool(failed) or not rows)


def _run(command: Sequence[str], path: Path, deadline: float) -> str | None:
    """None, or why it did not get to its end."""
    process = subprocess.Popen(command)
    while (status := process.poll()) is None:
        time.sleep(0.5)
        now = _under_way(path)
        limit = min(now["limit"] if now else deadline, deadline) + GRACE
        if time.time() > limit:
            process.kill()
            process.wait()
            return "time was up" if time.time() > deadline else "given up: it took too long"
    if status == LOST_DEVICE:
        return "the GPU took no more work"
    return None if status == 0 else f"the process ended with status {status}"


def _under_way(path: Path) -> dict | None:
    """The row that was begun last."""
    try:
        return json.loads(path.with_suffix(".now").read_text())
    except (OSError, ValueError):
        return None


def begin(path: Path, *, resume: bool) -> None:
    """An empty sheet, or with `resume` the rows that found something."""
    kept = [row for row in read(path) if not row.error] if resume else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    path.with_suffix(".now").unlink(missing_ok=True)
    for row in kept:
        append(path, row)
