"""Contexts with facts, and what is asked afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcompile.calibration import draw_episodes
from kvcompile.calibration.episodes import LEAD, QUOTED, QUOTES, REPLAYED
from kvcompile.calibration.family import Family, token_ids

TEXT = Family("text", tuple((lambda n=n: " ".join(f"word{n}x{i}" for i in range(3000))) for n in range(4)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(200, 1500), seed=st.integers(0, 99), replay=st.booleans())
def test_contexts_hold_what_is_asked(tokenizer: Any, length: int, seed: int, replay: bool) -> None:
    (episode,) = draw_episodes(tokenizer, [TEXT], length, 1, seed, replay=replay)
    assert len(episode.context) == length
    text = tokenizer.decode(episode.context)
    kinds = [one.kind for one in episode.follow_ups]
    assert kinds == ["continuation", *["question"] * 3, *(["replay"] if replay else ["quote"] * QUOTES)]
    for one in episode.follow_ups:
        assert 0 <= one.first < len(one.ids) - 1
        judged = one.ids[one.first + 1 :]
        if one.kind == "question":
            answer = tokenizer.decode(judged).strip()
            assert answer.isdigit()
            assert answer in text, "the context holds the answer"
        if one.kind == "quote":
            span = min(LEAD + QUOTED, length)
            assert contains(episode.context, one.ids[-span:])
            assert len(judged) == span - LEAD
        if one.kind == "replay":
            start, stop = episode.replayed
            assert stop - start == min(REPLAYED, length)
            assert np.array_equal(judged, episode.context[start:stop])


def contains(context: np.ndarray, part: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(context, len(part))
    return bool((windows == part).all(axis=1).any())


def test_the_text_goes_on_where_the_context_ends(tokenizer: Any) -> None:
    (episode,) = draw_episodes(tokenizer, [TEXT], 400, 1, 0, replay=False)
    going_on = episode.follow_ups[0]
    joined = np.concatenate([episode.context[-60:], going_on.ids])
    passages = [token_ids(tokenizer, document() + "\n\n") for document in TEXT.documents]
    assert any(contains(passage, joined) for passage in passages)


def test_families_take_turns_and_short_ones_are_served_again(tokenizer: Any) -> None:
    short = Family("short", (lambda: "only a few words here, and no more of them than that. " * 4,))
    episodes = draw_episodes(tokenizer, [TEXT, short], 300, 4, 0, replay=False)
    assert [episode.family for episode in episodes] == ["text", "short", "text", "short"]
    assert all(len(episode.context) == 300 for episode in episodes)


@pytest.mark.parametrize("replay", [True, False])
def test_seeds_and_purposes_draw_other_passages(tokenizer: Any, replay: bool) -> None:
    one, same, other, purpose = (
        draw_episodes(tokenizer, [TEXT], 300, 1, seed, replay=flag)[0].context
        for seed, flag in ((0, replay), (0, replay), (1, replay), (0, not replay))
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, purpose)
