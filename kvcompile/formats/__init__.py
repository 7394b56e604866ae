"""Files of other systems <-> plain arrays; a new format is a file here and a line below, or a call of `register`."""

from __future__ import annotations

from pathlib import Path

from kvcompile.artifacts import ExchangeError
from kvcompile.formats import duoattention, headkv, lukv, tangram, windows
from kvcompile.formats.base import Format
from kvcompile.formats.values import Curves, Gates, Importance, Value, Windows

FORMATS: dict[str, Format] = {
    "duoattention": duoattention.FORMAT,
    "lukv": lukv.FORMAT,
    "headkv": headkv.FORMAT,
    "tangram": tangram.FORMAT,
    "windows": windows.FORMAT,
}
"""By name. The last one is the first to be asked whether a path is its own: HeadKV's takes every JSON file that no
format after it does."""

__all__ = ["FORMATS", "Curves", "Format", "Gates", "Importance", "Value", "Windows", "read", "register"]


def register(name: str, format: Format) -> None:
    """Add a format, from inside or outside of this package; the same one may be added again.

    Raises:
        ValueError: a name that another format has.
    """
    if FORMATS.setdefault(name, format) != format:
        raise ValueError(f"there is a format {name!r} already: expected another name")


def read(path: Path) -> Value:
    """What a file, or a folder of files, of any of the formats says.

    Raises:
        ExchangeError: a file that is of no known kind, or malformed.
    """
    asked = list(reversed(FORMATS.values()))
    for format in asked:
        if format.owns(path):
            return format.read(path)
    looks = list(dict.fromkeys(format.looks for format in asked))
    raise ExchangeError(f"{path} is of no known kind: expected {', '.join(reversed(looks[1:]))} or {looks[0]}")
