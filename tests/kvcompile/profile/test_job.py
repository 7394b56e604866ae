"""The job apart from what it sums: stages in order, progress, and what an interruption leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvcompile.profile.job import Stage, run
from kvcompile.profile.resume import Sums
from kvcompile.profile.structure import Tick


class Counting:
    """A stage whose items add their number to a sum of its own, and note what the sums held when they came."""

    def __init__(self, name: str, work: list[int], needs: str | None = None, fails_at: int | None = None) -> None:
        self.name, self.work, self.needs, self.fails_at = name, work, needs, fails_at
        self.seen: list[float] = []

    def fresh(self) -> Sums:
        return {self.name: np.zeros(())}

    def add(self, sums: Sums, number: int, tick: Tick) -> None:
        tick(self.work[number])
        sums[self.name] += number + 1
        if number == self.fails_at:
            raise RuntimeError("stopped")
        if self.needs is not None:
            self.seen.append(float(sums[self.needs]))


def stages(fails_at: int | None = None) -> tuple[Stage, Counting]:
    return Counting("first", [2, 3]), Counting("second", [5, 7, 1], needs="first", fails_at=fails_at)


def test_a_stage_sees_the_whole_sums_of_those_before_it() -> None:
    first, second = stages()
    sums = run((first, second))
    assert {name: float(value) for name, value in sums.items()} == {"items": 5, "first": 3, "second": 6}
    assert second.seen == [3, 3, 3]


def test_progress_is_the_work_of_all_items() -> None:
    told: list[tuple[int, int]] = []
    run(stages(), progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 18), (5, 18), (10, 18), (17, 18), (18, 18)]


def test_an_interrupted_item_is_repeated_and_finished_ones_are_not(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        run(stages(fails_at=1), store=tmp_path)
    told: list[tuple[int, int]] = []
    first, second = stages()
    sums = run((first, second), progress=lambda done, total: told.append((done, total)), store=tmp_path)
    assert float(sums["second"]) == 6, "what the failed item had added was kept"
    assert second.seen == [3, 3]
    assert told == [(17, 18), (18, 18)]


def test_sums_of_other_stages_are_not_taken_up(tmp_path: Path) -> None:
    run(stages(), store=tmp_path)
    other = Counting("other", [1])
    assert float(run((other,), store=tmp_path)["other"]) == 1
