"""As much haystack as fits, and no more."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kvcompile.evaluation.ruler.fill import largest


@given(
    st.integers(0, 300), st.integers(1, 40), st.integers(0, 60), st.integers(1, 100), st.integers(0, 5000),
    st.integers(0, 9),
)  # fmt: skip
def test_one_more_would_not_fit(base: int, unit: int, uneven: int, least: int, spare: int, seed: int) -> None:
    rng = random.Random(seed)
    extra = [rng.randrange(uneven + 1) for _ in range(11_000)]
    for i in range(1, len(extra)):
        extra[i] += extra[i - 1]

    def size(units: int) -> int:
        return base + unit * units + extra[units]

    room = size(least) + spare
    found = largest(size, room, least, 10**4)
    assert size(found) <= room
    assert found == 10**4 or size(found + 1) > room


def test_few_places_are_looked_at() -> None:
    looked: list[int] = []

    def size(units: int) -> int:
        looked.append(units)
        return 90 + 23 * units + units % 7

    assert size(largest(size, 131_072, 1, 10**6) + 1) > 131_072
    assert len(looked) < 12


def test_there_may_be_no_more() -> None:
    assert largest(lambda units: units, 1000, 1, 5) == 5
    assert largest(lambda units: units, 7, 7, 7) == 7
