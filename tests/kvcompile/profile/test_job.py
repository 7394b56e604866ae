"""The job apart from what it measures: items in order, progress, weights, and what an interruption leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kvcompile.artifacts.errors import ModelError
from kvcompile.models.resident import register
from kvcompile.models.room import Room
from kvcompile.profile import job
from kvcompile.profile.held import Held, LostError
from kvcompile.profile.job import Item, run
from kvcompile.profile.lock import alone
from kvcompile.profile.ranks import Ranks, dist
from kvcompile.profile.resume import Sums, save

FRESH = {"total": np.zeros(()), "last": np.zeros(())}
Run = Callable[[Sums, Held], Any]


def adding(number: int) -> Item:
    """Adds its number to a total, and hands it to the next item, which must find it."""

    def item(sums: Sums, held: Held) -> Any:
        if number > 1:
            assert held.one(f"state{number - 1}").item() == number - 1
            held.drop(f"state{number - 1}")
        held.put(f"state{number}", number=torch.tensor(number))
        return [("total", ..., number)]

    return Item(item, work=number)


def failing(_: Sums, held: Held) -> None:
    held.drop("state3")
    raise RuntimeError("stopped")


def numbers(count: int) -> list[Item]:
    return [adding(number) for number in range(1, count + 1)]


def fresh() -> Sums:
    return {name: table.copy() for name, table in FRESH.items()}


def test_items_add_up_and_hand_on_what_they_hold() -> None:
    sums = run(numbers(5), fresh(), Held())
    assert (float(sums["total"]), int(sums["items"])) == (15, 5)


def test_progress_is_the_work_of_all_items() -> None:
    told: list[tuple[int, int]] = []
    run(numbers(4), fresh(), Held(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 10), (3, 10), (6, 10), (10, 10)]


@pytest.mark.parametrize("every", [0.0, 1e9])
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_an_interrupted_item_is_repeated_and_finished_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float, memory: int
) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY", every)
    states = tmp_path / "states"
    with pytest.raises(RuntimeError, match="stopped"):
        run([*numbers(3), Item(failing), *numbers(0)], fresh(), Held(states, Room(0, memory)), store=tmp_path)
    told: list[tuple[int, int]] = []
    items = [*numbers(3), adding(4)]
    sums = run(items, fresh(), Held(states, Room(0, memory)), progress=lambda *at: told.append(at), store=tmp_path)
    assert (float(sums["total"]), told) == (10, [(10, 10)])
    assert not states.exists(), "what was held is no longer needed"
    assert float(run(items, fresh(), Held(states), store=tmp_path)["total"]) == 10


def test_sums_of_other_jobs_are_not_taken_up(tmp_path: Path) -> None:
    run(numbers(3), fresh(), Held(), store=tmp_path)
    assert int(run(numbers(1), {**fresh(), "other": np.zeros(1)}, Held(), store=tmp_path)["items"]) == 1


class Counting:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def bring(self) -> None:
        self.log.append(f"+{self.name}")

    def release(self) -> None:
        self.log.append(f"-{self.name}")

    def ahead(self) -> None:
        self.log.append(f"?{self.name}")


def test_weights_stay_for_items_side_by_side_and_the_next_are_read_ahead() -> None:
    log: list[str] = []
    parts = [nn.Identity() for _ in "abc"]
    for part, name in zip(parts, "abc", strict=True):
        register(part, Counting(log, name))

    def item(number: int) -> Item:
        def use(*_: Any) -> None:
            parts[number](torch.zeros(1))
            log.append("use")

        return Item(use, parts[number])

    run([item(0), item(0), Item(lambda *_: None), item(1), item(2)], fresh(), Held())
    assert log == ["+a", "?b", "use", "use", "-a", "?b", "+b", "?c", "use", "-b", "+c", "use", "-c"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "SAVE_EVERY", 0.0)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ModelError, match=r"cannot be written to .*No space left.*: make room"):
        run(numbers(2), fresh(), Held(tmp_path / "states"), store=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "all gone"])
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_unfinished_sums_without_what_they_need_start_again(tmp_path: Path, damage: str, memory: int) -> None:
    states = tmp_path / "states"
    with pytest.raises(RuntimeError, match="stopped"):
        run([*numbers(3), Item(failing)], fresh(), Held(states, Room(0, memory)), store=tmp_path)
    file = states / "state3.safetensors"
    if damage == "all gone":
        shutil.rmtree(states)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 40 if damage == "cut" else 0])
    sums = run(numbers(4), fresh(), Held(states, Room(0, memory)), store=tmp_path)
    assert (float(sums["total"]), int(sums["items"])) == (10, 4)
    assert float(run(numbers(4), fresh(), Held(states), store=tmp_path)["total"]) == 10


def test_what_is_missing_though_nothing_was_resumed_is_one_sentence(tmp_path: Path) -> None:
    item = Item(lambda _, held: held.drop("other") or held.one("other"))
    with pytest.raises(LostError, match=r"other: start the build again"):
        run([item], fresh(), Held(tmp_path / "states"), store=tmp_path)


def test_a_second_job_waits_and_finds_the_sums_finished(tmp_path: Path) -> None:
    """Two threads with a handle each of the lock's file are to the system what two processes are."""
    begun, waits, later = Event(), Event(), []

    def second() -> None:
        begun.wait(60)
        later.append(run([*numbers(3)], fresh(), Held(tmp_path / "s"), never, store=tmp_path, waiting=waits.set))

    def never(*_: int) -> None:
        raise AssertionError("measured again")

    def slow(_: Sums, __: Held) -> None:
        begun.set()
        assert waits.wait(60), "the other did not wait"

    thread = Thread(target=second)
    thread.start()
    first = run([*numbers(2), Item(slow)], fresh(), Held(tmp_path / "s"), store=tmp_path, waiting=never)
    thread.join()
    assert (float(first["total"]), float(later[0]["total"])) == (3, 3)


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """As if there were another process, which has nothing to do."""

    def gather(found: list[Any], value: Any) -> None:
        found[:] = [([], False), value]

    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    return Ranks(1, 2)


def owned(item: Item) -> Item:
    return Item(item.run, work=item.work, owner=1)


def test_the_first_of_several_processes_alone_takes_the_lock(tmp_path: Path, second_of_two: Ranks) -> None:
    items = [owned(item) for item in numbers(3)]
    with alone(tmp_path):
        sums = run(items, fresh(), Held(tmp_path / "s"), store=tmp_path, ranks=second_of_two)
    assert float(sums["total"]) == 6


def test_several_processes_that_lost_something_start_again_when_they_are_started(
    tmp_path: Path, second_of_two: Ranks
) -> None:
    """The others, in the midst of it, cannot be told."""
    items = [owned(item) for item in numbers(4)]
    save(tmp_path, {"items": np.array(3), "total": np.array(6.0), "last": np.zeros(())}, "sums-2.npz")
    with pytest.raises(LostError, match="start the build again"):
        run(items, fresh(), Held(tmp_path / "s"), store=tmp_path, ranks=second_of_two)
    sums = run(items, fresh(), Held(tmp_path / "s"), store=tmp_path, ranks=second_of_two)
    assert float(sums["total"]) == 10
