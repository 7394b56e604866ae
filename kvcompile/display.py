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

from kvcompile.artifacts import POLICIES, Artifact, KvcompileError
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


def summary(artifact: Artifact) -> dict[str, Any]:
    """An artifact's account as a JSON object."""
    budgets, target = artifact.budgets, artifact.target
    loss = artifact.predicted_loss
    return {
        "model": artifact.model.name,
        "architecture": artifact.model.architecture,
        "target_bytes": target.bytes,
        "context": target.context,
        "batch": target.batch,
        "dtype": target.dtype,
        "resident_bytes": artifact.bytes.resident,
        "transient_bytes": artifact.bytes.transient,
        "scorer_bytes": artifact.bytes.scorer,
        "full_bytes": artifact.bytes.full,
        "share_of_full": artifact.bytes.resident / artifact.bytes.full,
        "quantised_positions": quantised_positions(artifact),
        "policies": {name: int((budgets.policy == i).sum()) for i, name in enumerate(POLICIES)},
        "predicted_loss": None if loss != loss else loss,
        "solver": dict(artifact.solver),
        "calibration": dict(artifact.calibration),
        "versions": dict(artifact.versions),
    }


def quantised_positions(artifact: Artifact) -> int | None:
    """The number of positions, from 0 on, that the transforms of keys are made for: the context's, or the profile's
    window in files from before a profile had moments of keys; None without a quantiser, or where the file is silent."""
    if artifact.quantiser is None:
        return None
    if "rotary_frequency" in artifact.profile:
        return artifact.target.context
    window = artifact.profile.get("window")
    return None if window is None else int(window[0])


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
