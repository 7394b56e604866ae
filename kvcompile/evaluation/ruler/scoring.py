"""RULER's score."""

from __future__ import annotations

from collections.abc import Sequence


def string_match_all(answer: str, expected: Sequence[str]) -> float:
    """The share of the expected strings that occur in an answer, upper and lower case alike, times 100
    (arXiv 2404.06654)."""
    said = answer.lower()
    return 100 * sum(one.lower() in said for one in expected) / len(expected)
