"""Windows: lengths as asked, families in turn, no passage twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcompile.artifacts.errors import CalibrationError
from kvcompile.calibration.family import Family
from kvcompile.calibration.windows import draw_windows


def numbered(name: str, sizes: list[int]) -> Family:
    """Documents of so many words, no word twice in the family."""
    texts, start = [], 0
    for size in sizes:
        texts.append(" ".join(f"{name}{i:05}" for i in range(start, start + size)))
        start += size
    return Family(name, tuple(partial(str, text) for text in texts))


def words(tokenizer: Any, ids: Any) -> list[str]:
    """Whole words of a window; the first and last may be cut."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).split()[1:-1]


def test_lengths_are_as_asked_and_every_family_gets_every_length(tokenizer: Any, bos: list[int]) -> None:
    families = [numbered(name, [400] * 4) for name in "abc"]
    lengths = [256, 128, 64] * 3
    drawn = draw_windows(tokenizer, families, lengths, seed=0)
    assert [len(window.ids) for window in drawn] == lengths
    assert sorted((w.family, len(w.ids)) for w in drawn) == sorted((f, n) for f in "abc" for n in (256, 128, 64))
    assert all(window.ids.dtype == np.int64 for window in drawn)
    assert all(list(window.ids[: len(bos)]) == bos and 0 not in window.ids[len(bos) :] for window in drawn)


@given(
    sizes=st.lists(st.integers(0, 120), min_size=1, max_size=6),
    lengths=st.lists(st.integers(8, 300), min_size=1, max_size=8),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_no_passage_comes_twice(tokenizer: Any, sizes: list[int], lengths: list[int], seed: int) -> None:
    families = [numbered("a", sizes), numbered("b", sizes[::-1])]
    try:
        drawn = draw_windows(tokenizer, families, lengths, seed)
    except CalibrationError:
        assert sum(sizes) < 64  # tokens are at least as many
        return
    assert len(drawn) <= len(lengths)
    seen = [word for window in drawn for word in words(tokenizer, window.ids) if len(word) == 6]
    assert len(seen) == len(set(seen))


def test_unused_ends_are_served_when_documents_run_out(tokenizer: Any) -> None:
    drawn = draw_windows(tokenizer, [numbered("a", [600])], [128] * 10, seed=0)
    assert [len(window.ids) for window in drawn] == [128] * 10
    assert len({window.ids.tobytes() for window in drawn}) == 10


def test_documents_are_read_only_when_drawn(tokenizer: Any) -> None:
    read: list[int] = []

    def document(number: int) -> str:
        read.append(number)
        return "lorem ipsum " * 500

    documents: tuple[Callable[[], str], ...] = tuple(partial(document, number) for number in range(50))
    draw_windows(tokenizer, [Family("a", documents)], [128, 128], seed=0)
    assert len(read) == 2


def test_a_used_up_family_is_passed_over(tokenizer: Any) -> None:
    drawn = draw_windows(tokenizer, [numbered("short", [4]), numbered("long", [900])], [128] * 6, seed=0)
    assert [window.family for window in drawn] == ["long"] * 6


def test_little_text_gives_a_shorter_window(tokenizer: Any) -> None:
    (window,) = draw_windows(tokenizer, [numbered("a", [40])], [4096, 4096], seed=0)
    assert 64 <= len(window.ids) < 4096


def test_too_little_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"\(tiny\) is too short: expected at least 64 tokens"):
        draw_windows(tokenizer, [numbered("tiny", [3])], [128], seed=0)
