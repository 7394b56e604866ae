"""Memory targets: `8GB`, `512MiB`, `25%`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from kvcompile.artifacts import TargetError

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", start=1)
    for binary in ("", "i")
}


@dataclass(frozen=True)
class Memory:
    """A target as it was written: a number of bytes, or a share of the full cache in percent."""

    text: str
    amount: Decimal
    is_share: bool

    def bytes(self, full: int) -> int:
        """The target in bytes, rounded down, where the full cache takes `full`."""
        return int(self.amount * full / 100) if self.is_share else int(self.amount)


def parse_memory(text: str) -> Memory:
    """Read a target such as `8GB` (10^9), `512MiB` (2^20), `1000000` (bytes) or `25%` (of the full cache).

    Raises:
        TargetError: anything else, zero included.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[A-Za-z]*)\s*", text)
    units = {unit.upper(): size for unit, size in UNITS.items()}
    if not match or (match[2] != "%" and match[2].upper() not in units):
        raise TargetError(
            f"{text!r} is no amount of memory: expected bytes such as 8GB or 512MiB, or a share such as 25%"
        )
    amount = Decimal(match[1]) * (1 if match[2] == "%" else units[match[2].upper()])
    if amount == 0:
        raise TargetError(f"a memory target of {text!r} leaves no room for a cache: expected more than zero")
    return Memory(text.strip(), amount, match[2] == "%")


def parse_bytes(text: str) -> int:
    """Read an amount of memory in bytes, such as `8GB`.

    Raises:
        TargetError: anything else, shares included.
    """
    memory = parse_memory(text)
    if memory.is_share:
        raise TargetError(f"{text!r} is a share: expected bytes such as 8GB or 512MiB")
    return int(memory.amount)
