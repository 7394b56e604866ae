"""Memory targets as users write them."""

from __future__ import annotations

import pytest

from kvcompile.artifacts import TargetError
from kvcompile.problem.memory import parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9), ("512MiB", 512 * 2**20), ("1.5 kB", 1500), ("1000000", 10**6), ("7b", 7), ("2tib", 2**41),
        ("25%", 250), ("100%", 1000), ("12.5 %", 125), ("0.1%", 1), ("150%", 1500),
    ],
)  # fmt: skip
def test_sizes_and_shares(text: str, size: int) -> None:
    assert parse_memory(text).bytes(full=1000) == size


@pytest.mark.parametrize("text", ["8XB", "", "GB", "-1GB", "1e9", "25%%", "8 G B", "nan", "0x10", "8GB 9GB"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match="no amount of memory"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0%", "0.0 MiB"])
def test_zero_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match="no room"):
        parse_memory(text)
