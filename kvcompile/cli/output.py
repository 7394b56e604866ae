"""Where a command's output goes: the two consoles, JSON, whole files, and bytes in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from kvcompile.artifacts import KvcompileError
from kvcompile.artifacts.serialize import replace_file

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)

PIPE_COLUMNS = 120
"""Width of tables that do not go to a terminal: a pipe has no width of its own, and a table cut short is of no use."""


def wide() -> Console:
    """stdout for tables."""
    return stdout if stdout.is_terminal else Console(width=PIPE_COLUMNS, highlight=False)


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


def human(size: int) -> str:
    """Bytes for people: `1.23 GB (1234567890 bytes)`."""
    return f"{size} bytes" if size < 1000 else f"{approximate(size)} ({size} bytes)"


def approximate(size: int) -> str:
    """Bytes to three digits: `1.23 GB`."""
    value, unit = float(size), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":  # what is not rounded up to four digits
            break
        value /= 1000
    return f"{value:.3g} {unit}"


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
