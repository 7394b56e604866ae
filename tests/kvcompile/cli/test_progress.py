"""Progress where stderr is no terminal: lines at their times, by a clock that the test sets."""

from __future__ import annotations

import pytest

from kvcompile.cli import output, progress
from kvcompile.cli.progress import LINE_SECONDS, Lines


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def written() -> list[str]:
    return []


@pytest.fixture
def lines(clock: Clock, written: list[str]) -> Lines:
    return Lines(written.append, clock)


def pass_seconds(clock: Clock, lines: Lines, seconds: int) -> None:
    for _ in range(seconds):
        clock.now += 1
        lines.tick()


def test_a_stage_has_a_line_when_it_begins_and_one_every_thirty_seconds(
    clock: Clock, lines: Lines, written: list[str]
) -> None:
    assert LINE_SECONDS == 30
    for done in range(1, 81):
        lines.report("profiling", done, 200)
        pass_seconds(clock, lines, 1)
    assert written == ["profiling ...", "profiling: 15%, 30 s so far", "profiling: 30%, 60 s so far"]


def test_a_step_that_takes_long_does_not_hold_up_the_lines(clock: Clock, lines: Lines, written: list[str]) -> None:
    lines.report("profiling", 1, 4)
    pass_seconds(clock, lines, 95)
    assert written[1:] == [f"profiling: 25%, {seconds} s so far" for seconds in (30, 60, 90)]


def test_every_stage_is_timed_apart(clock: Clock, lines: Lines, written: list[str]) -> None:
    lines.report("profiling", 1, 2)
    pass_seconds(clock, lines, 20)
    lines.report("refining", 7, 0)
    pass_seconds(clock, lines, 31)
    assert written == ["profiling ...", "refining ...", "refining: 30 s so far"]


def test_a_stage_that_comes_back_does_not_begin_again(clock: Clock, lines: Lines, written: list[str]) -> None:
    for stage in ("searching", "refining", "searching"):
        lines.report(stage, 1, 0)
        pass_seconds(clock, lines, 10)
    pass_seconds(clock, lines, 20)
    assert written == ["searching ...", "refining ...", "searching: 50 s so far"]


def test_waiting_has_lines_only_if_it_takes_long(clock: Clock, lines: Lines, written: list[str]) -> None:
    lines.begin("loading", quietly=True)
    pass_seconds(clock, lines, 29)
    assert written == []
    pass_seconds(clock, lines, 1)
    assert written == ["loading: 30 s so far"]


def test_nothing_is_written_before_a_stage(clock: Clock, lines: Lines, written: list[str]) -> None:
    pass_seconds(clock, lines, 100)
    assert written == []


def test_stages_go_to_stderr_as_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert not output.stderr.is_terminal
    with progress.waiting("loading"), progress.stages() as report:
        report("measuring", 0, 5)
        report("measuring", 5, 5)
    assert capsys.readouterr() == ("", "measuring ...\n")


def test_lines_come_while_the_work_stands_still(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the thread, with the real clock: no call of `report` is needed."""
    import time

    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with progress.stages() as report:
        report("measuring", 1, 5)
        text, deadline = "", time.monotonic() + 600
        while "so far" not in text and time.monotonic() < deadline:
            time.sleep(0.05)
            text += capsys.readouterr().err
    assert "measuring: 20%, " in text


def test_a_terminal_has_bars_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    monkeypatch.setattr(output, "stderr", Console(file=screen, force_terminal=True, width=80))
    with progress.stages() as report:
        report("measuring", 2, 5)
    assert "40%" in screen.getvalue()
    assert "..." not in screen.getvalue()
