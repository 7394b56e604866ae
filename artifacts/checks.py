"""The checks that every part of an artifact shares, and the sentence with which they refuse."""

from __future__ import annotations

import reprlib
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts.errors import ArtifactError
from kvcompile.artifacts.schema import DTYPE_BITS

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
"""Element types that a file may hold, by safetensors' name."""

MAX_TOKENS = 2**31 - 1
MAX_BATCH = 2**20
MAX_BYTES = 2**63 - 1

MAX_FILE_BYTES = 2**30
"""Largest file that is read or written."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


def refuse(source: str, field: str, problem: str) -> NoReturn:
    """Raise the sentence `source: field problem`."""
    raise ArtifactError(f"{source}: {field} {problem}")


def printable(text: str) -> str:
    """The text as one line, whatever a file or a file's name holds: unprintable characters are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def show(value: object) -> str:
    """A found value, short enough for a sentence, however long or deep it is."""
    return printable(_SHORT.repr(value))


def require_integer(source: str, field: str, value: object, low: int, high: int) -> None:
    """Refuse all but a Python int in [low, high]; a bool is not an integer here."""
    if type(value) is not int or not low <= value <= high:
        refuse(source, field, f"is {show(value)}, expected an integer from {low} to {high}")


def require_text(source: str, field: str, value: object) -> None:
    """Refuse all but one line of text."""
    if not isinstance(value, str) or not 0 < len(value) <= 4096 or not value.isprintable():
        refuse(source, field, f"is {show(value)}, expected printable text of 1 to 4096 characters")


def require_dtype(source: str, field: str, value: object) -> None:
    """Refuse all but a name of `DTYPE_BITS`."""
    if not isinstance(value, str) or value not in DTYPE_BITS:
        refuse(source, field, f"is {show(value)}, expected one of {', '.join(DTYPE_BITS)}")


def require_array(source: str, field: str, values: object, dtypes: tuple[str, ...]) -> None:
    """Refuse all but an array of one of these element types."""
    if not isinstance(values, np.ndarray) or values.dtype not in [DTYPES[name] for name in dtypes]:
        found = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        refuse(source, f"tensor {field}", f"has the element type {found}, expected {' or '.join(dtypes)}")


def require_finite(source: str, field: str, values: NDArray[Any]) -> None:
    """Refuse NaN and infinity, and name the first."""
    finite = np.isfinite(values)
    if not finite.all():
        # Not np.argwhere: of a hostile file it would list a billion places.
        bad = tuple(int(i) for i in np.unravel_index(int(np.argmin(finite)), values.shape))
        refuse(source, f"tensor {field}", f"has {values[bad]} at {list(bad)}, expected finite numbers")


def require_size(source: str, size: int) -> None:
    """Refuse a file of too many bytes."""
    if size > MAX_FILE_BYTES:
        refuse(source, "the file", f"has {size} bytes, expected at most {MAX_FILE_BYTES}")
