"""What a format of another system is to us."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcompile.formats.values import Value


@dataclass(frozen=True)
class Format:
    """One kind of file, or of folder with several files (`folder`).

    `read` gives what the file at a path says, and raises ExchangeError where it is malformed. `write` gives the
    contents, by file name, that say a value; of which kind of value, is each format's own. `owns` tells from a path's
    form, or from what is in it, whether `read` is meant to read it; it raises ExchangeError where it looks inside and
    cannot. `looks` says in a message what such a path looks like.
    """

    read: Callable[[Path], Value]
    write: Callable[[Any], dict[str, bytes]]
    owns: Callable[[Path], bool]
    looks: str
    folder: bool = False
