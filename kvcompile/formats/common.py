"""What the formats share: checks on files that others wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import ExchangeError

MOST = 1 << 28
"""Bytes of a file that is looked at."""

MOST_TOKENS = 2**31 - 1
"""Of a context, as an artifact has them."""

Parsed = TypeVar("Parsed")


def parsed(path: Path, parse: Callable[[bytes], Parsed]) -> Parsed:
    """What `parse` makes of a file.

    Raises:
        ExchangeError: a file that cannot be opened, or that `parse` cannot make anything of.
    """
    try:
        if path.stat().st_size > MOST:
            raise ExchangeError(f"{path} is larger than {MOST} bytes: expected a table of heads")
        return parse(path.read_bytes())
    except OSError as error:
        raise ExchangeError(f"{path} cannot be read: {error.strerror or error}") from None
    except ExchangeError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExchangeError(f"{path} is not such a file: {text[:200]}") from None


def whole(data: bytes) -> dict[str, Any]:
    """A JSON object."""
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("expected a JSON object")
    return found


def numbers(
    path: Path, found: Mapping[str, Any], name: str, least: float = -np.inf, *, integers: bool = False
) -> NDArray[np.float64]:
    """The numbers under a name, as an array.

    Raises:
        ExchangeError: none there, or none that are finite and at least `least`.
    """
    try:
        array = np.asarray(found[name])
        real = (
            array.dtype.kind in "iuf" and array.size > 0 and bool(np.isfinite(array).all() and (array >= least).all())
        )
    except (KeyError, ValueError):
        real = False
    if not real or (integers and array.dtype.kind == "f"):
        kind = "whole numbers" if integers else "finite numbers"
        bound = "" if least == -np.inf else f" of at least {least:g}"
        raise ExchangeError(f"{path} has no usable {name!r}: expected {kind}{bound}")
    return array.astype(np.float64)


def count(path: Path, found: Mapping[str, Any], name: str, least: int) -> int:
    """The one whole number under a name.

    Raises:
        ExchangeError: none there, or one that is below `least` or above any context.
    """
    number = numbers(path, found, name, least, integers=True)
    if number.ndim or number > MOST_TOKENS:
        raise ExchangeError(f"{path} has no usable {name!r}: expected one whole number up to {MOST_TOKENS}")
    return int(number)


def json_object(value: Mapping[str, Any]) -> bytes:
    """One line of JSON."""
    return json.dumps(value).encode() + b"\n"
