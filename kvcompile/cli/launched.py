"""Which of several processes this one is, by the environment variables that torchrun sets."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvcompile.artifacts import ModelError


@dataclass(frozen=True)
class Launched:
    """Process `rank` of `count`, and number `local` on this machine, on which `here` are known to be."""

    rank: int
    count: int
    local: int
    here: int


def launched() -> Launched:
    """This process; one alone without torchrun.

    Raises:
        ModelError: variables that torchrun would not have set.
    """
    found = Launched(
        _number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    )
    # A launcher other than torchrun may say which process of a machine this is, and not of how many.
    counted = "LOCAL_WORLD_SIZE" in os.environ
    if found.rank >= found.count or (counted and found.local >= found.here):
        raise ModelError(
            f"the environment says that this is process {found.rank} of {found.count} (RANK, WORLD_SIZE) and "
            f"{found.local} of {found.here} on this machine (LOCAL_RANK, LOCAL_WORLD_SIZE), counted from 0: "
            "expected what torchrun sets, or none of these variables"
        )
    return found


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ModelError(
            f"the environment variable {variable} is {text!r}: expected a whole number, as torchrun sets it, or none"
        )
    return int(text)
