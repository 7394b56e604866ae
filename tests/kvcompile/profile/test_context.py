"""Follow-ups side by side in one pass."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompile.calibration import FollowUp
from kvcompile.profile.context import judged, pack, told_tokens


def test_the_last_token_of_each_may_be_left_out() -> None:
    """What follows it is in no follow-up, so nothing that is said there is judged."""
    asked = [FollowUp("question", 3, np.arange(10, 16)), FollowUp("continuation", 0, np.arange(20, 25))]
    whole, told = pack(100, asked), pack(100, asked, last=False)
    assert [(b.start, b.judged, b.stop) for b in whole.blocks] == [(0, 3, 6), (6, 6, 11)]
    assert [(b.start, b.judged, b.stop) for b in told.blocks] == [(0, 3, 5), (5, 5, 9)]
    assert told.ids.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 23]
    assert told.positions.tolist() == [100, 101, 102, 103, 104, 100, 101, 102, 103]
    assert judged(told.blocks[0], 64).tolist() == [3, 4]


@pytest.mark.parametrize(("first", "length"), [(0, 1), (4, 5)])
def test_one_row_is_always_judged(first: int, length: int) -> None:
    asked = FollowUp("quote", first, np.arange(length))
    packed = pack(10, [asked], last=False)
    assert told_tokens(asked) == length
    assert len(judged(packed.blocks[0], 64)) == 1
