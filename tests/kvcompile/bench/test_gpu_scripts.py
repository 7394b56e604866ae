"""The scripts for a machine with a GPU, as far as one without can say: every row is tried with tiny shapes, and a sheet
loses nothing when a row fails, hangs or ends the process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    """The scripts' folder as Python has it when one of them runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dry_run_has_every_row(tmp_path: Path) -> None:
    out = tmp_path / "sheet.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--dry-run", "--seconds", "3000", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = {row["check"]: row for row in lines(out)}
    assert [row for row in rows.values() if row["error"]] == []
    assert sum(check.startswith("smoke: ") for check in rows) == 15
    asked = {check: row["asked"] for check, row in rows.items() if row["asked"] and not check.startswith("smoke: ")}
    assert asked == {
        "ragged, of copy bandwidth": "90%", "ragged int4, of copy bandwidth": "70%",
        "ragged int4, as many tokens, of copy bandwidth": "70%", "ragged, time a byte of uniform": "1.1",
        "group 5, 16 bits, time of group 8": "1.05", "group 7, 16 bits, time of group 8": "1.05",
        "weights and cache, of copy bandwidth": "75%", "host waits inside a step": "0",
        "tokens a second, times transformers' static cache": "1.8",
        "tokens a second, times the best full-cache step (torch SDPA, groups as rows)": "1.5", "build, 7B": "120 s",
    }  # fmt: skip
    order = list(rows)
    assert order.index("build, 7B") < order.index("attention, group 7, 1 x 8192"), "the bars come first"
    for group in (4, 5, 7, 8):
        for batch in (1, 4, 16, 64):
            assert all(f"attention, group {group}, {batch} x {context}" in rows for context in (8192, 32768, 131072))


def test_a_row_that_fails_or_does_not_fit_is_a_row(scripts, tmp_path: Path) -> None:
    from sheet import Found, Sheet

    path = tmp_path / "sheet.jsonl"
    sheet = Sheet(path, time.time(), time.time() + 100)
    assert sheet.measure("one", lambda: Found("1 us", True, {"us": 1}), asked="2 us") == {"us": 1}
    assert sheet.measure("broken", lambda: Found(str(1 // 0)), asked="2 us") is None
    assert sheet.measure("long", lambda: Found("never"), asked="2 us", seconds=1000) is None
    assert sheet.measure("long and not judged", lambda: Found("never"), seconds=1000) is None
    sheet.judge("ratio", "1.2", "1.1", False)
    rows = {row["check"]: row for row in lines(path)}
    assert [row["met"] for row in rows.values()] == [True, False, False, None, False]
    assert rows["broken"]["error"].startswith("ZeroDivisionError: ")
    assert "left, needs about 1000 s" in rows["long"]["error"]
    # A process that goes on knows what was found.
    again = Sheet(path, time.time(), time.time() + 100)
    assert again.measure("one", lambda: Found("2 us", True, {"us": 2})) == {"us": 1}
    assert again.measure("broken", lambda: Found("now it works", True, {"us": 3})) is None


WORKER = """
import os, sys, time
from pathlib import Path
from sheet import Found, Sheet
sheet = Sheet(Path(sys.argv[1]), time.time(), float(sys.argv[2]))
sheet.measure("before", lambda: Found("fine", True), seconds=0)
sheet.measure("crash", lambda: os._exit(139), asked="no crash", seconds=0)
sheet.measure("between", lambda: Found("fine", True), seconds=0)
sheet.measure("hang", lambda: time.sleep(1000), asked="no hang", seconds=0)
"""


def test_a_crash_costs_one_row_and_a_hang_ends_with_the_time(
    scripts, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from supervise import begin, finish, supervise

    monkeypatch.setattr("supervise.LEAST", 0)
    monkeypatch.setattr("supervise.GRACE", 0)

    script, path, start = tmp_path / "worker.py", tmp_path / "sheet.jsonl", time.time()
    script.write_text(f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}){WORKER}")
    begin(path, resume=False)
    deadline = start + 5
    supervise([sys.executable, str(script), str(path), str(deadline)], path, start, deadline)
    rows = {row["check"]: row for row in lines(path)}
    assert {check: row["met"] for check, row in rows.items()} == {
        "before": True, "crash": False, "between": True, "hang": False,
    }  # fmt: skip
    assert rows["crash"]["error"] == "the process ended with status 139"
    assert rows["hang"]["error"] == "time was up"
    assert finish(path) == 1
    assert "crash" in capsys.readouterr().out
    begin(path, resume=True)
    assert [row["check"] for row in lines(path)] == [check for check, row in rows.items() if not row["error"]]


def test_what_pytest_printed_is_read_also_where_it_was_cut(scripts) -> None:
    from gpu_test import summary

    outcomes, failures = summary(
        "[gw0] [  1%] PASSED tests/a.py::test_one[x - 1] \n[gw1] [  2%] FAILED tests/a.py::test_two \n"
        "tests/a.py::test_three SKIPPED (no reason)   [ 3%]\nFAILED tests/a.py::test_two - ValueError: too many\n"
        "noise\n"
    )
    assert outcomes == {"PASSED": 1, "FAILED": 1, "SKIPPED": 1}
    assert failures == {"tests/a.py::test_two": "ValueError: too many"}
