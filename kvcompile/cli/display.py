"""What commands show on a terminal: progress bars, tables, bytes in words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kvcompile.artifacts import KvcompileError
from kvcompile.artifacts.serialize import replace_file

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice for programmers off the terminal."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, done, total) that draws one bar a stage on stderr; silent where that is no terminal. A total
    of 0 is one that is not known."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)

        yield report


def human(size: int) -> str:
    """Bytes for people: `1.23 GB (1234567890 bytes)`."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{size} bytes" if unit == "bytes" else f"{value:.3g} {unit} ({size} bytes)"


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def write_text(path: Path, text: str) -> None:
    """Put a whole file in place, or none.

    Raises:
        KvcompileError: a path that cannot be written.
    """
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise KvcompileError(f"{path} cannot be written: {error.strerror or error}") from None
