"""RULER's score."""

from __future__ import annotations

import pytest

from kvcompile.evaluation.ruler.scoring import string_match_all


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        (" 1234567.", ("1234567",), 100),
        ("I cannot tell.", ("1234567",), 0),
        ("", ("a",), 0),
        (" ABCDE and fghij", ("abcde", "FGHIJ", "KLMNO", "PQRST"), 50),
        ("1. Lantern 2. lanterns", ("lantern",), 100),
        ("one, two", ("one", "two", "three"), 200 / 3),
    ],
)
def test_it_is_the_share_of_the_expected_strings(answer: str, expected: tuple[str, ...], score: float) -> None:
    assert string_match_all(answer, expected) == pytest.approx(score)
