"""The tests on a GPU, and a memory check of every operation: `make gpu-test`.

    python benchmarks/gpu_test.py [--seconds 450] [--out gpu-test.jsonl]

First the kernels against their references, then the decode loop and the rest of the kernels' tests, then
compute-sanitizer's memcheck over the smoke tests, whose kernels are compiled beside the tests. Every row, and every
test that failed, is a line of JSON in `--out` as soon as it is there; what pytest printed is beside it in a log.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sheet import Found, Sheet
from supervise import begin, finish

ROOT = Path(__file__).resolve().parent.parent
PARTS = [
    ("kernels against their references", ["tests/kernels/test_triton*.py"]),
    ("decode loop", ["tests/runtime/test_decode.py", "tests/runtime/test_cuda*.py"]),
    ("other tests of the kernels", ["tests/kernels"]),
]
"""In each, what an earlier one has run is left out."""
ELSEWHERE = "not spills and not machine_code"
"""Compiling ahead of time for several cards needs no GPU: `make test` does it."""
MEMCHECK = 60.0
"""Seconds that are kept for it."""
FAREWELL = 6.0
"""Seconds that pytest has to sum up when its time is up."""
WORKERS = 16
MOST_FAILURES = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=450, help="that all parts may take together")
    parser.add_argument("--out", type=Path, default=Path("gpu-test.jsonl"))
    args = parser.parse_args()
    begin(args.out, resume=False)
    log = args.out.with_suffix(".log").resolve()
    log.write_text("")
    start = time.time()
    sheet = Sheet(args.out, start, start + args.seconds)
    # Compiled under the sanitizer, kernels would take all of its time.
    compiling = subprocess.Popen(smoke(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before: list[str] = []
    for name, patterns in PARTS:
        found = [str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
        chosen = [path for path in found if path not in before]
        limit = sheet.left - MEMCHECK
        command = pytest_command(chosen, before)
        before += chosen
        sheet.measure(name, lambda command=command, limit=limit: tests(sheet, command, log, limit), asked="all pass",
                      seconds=MEMCHECK + 20)  # fmt: skip
    sheet.measure("memcheck", lambda: memcheck(compiling, log, sheet.left), asked="no errors", seconds=20)
    sys.exit(finish(args.out))


def pytest_command(paths: Sequence[str], ignored: Sequence[str]) -> list[str]:
    """One line a test, as it comes, in several processes where pytest-xdist is installed: most of the time is compiling
    kernels, which tests of a group share (`tests/conftest.py`)."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-k", ELSEWHERE, *paths]
    command += [f"--ignore={path}" for path in ignored]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadgroup"]
    return command


def tests(sheet: Sheet, command: Sequence[str], log: Path, limit: float) -> Found:
    """Run tests for at most `limit` seconds, with a row for every one that failed."""
    text, status = run(command, log, limit)
    outcomes, failures = summary(text)
    for test, why in list(failures.items())[:MOST_FAILURES]:
        sheet.missing(test, "passes", why)
    words = ", ".join(f"{count} {word.lower()}" for word, count in sorted(outcomes.items())) or "no test ran"
    words += "" if status is not None else f", cut after {limit:.0f} s"
    passed = status == 0 and outcomes["PASSED"] > 0
    return Found(words, passed, {"status": status, "outcomes": dict(outcomes), "failures": failures})


def summary(text: str) -> tuple[Counter[str], dict[str, str]]:
    """How many tests ended how, and why each failed, from pytest's lines, also where they were cut."""
    outcomes, failures = Counter[str](), dict[str, str]()
    for line in text.splitlines():
        # With processes "[gw0] [ 1%] PASSED name", without "name PASSED [ 1%]", at the end "FAILED name - why".
        if found := re.match(r"(?:FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", line):
            failures[found[1]] = found[2] or "failed"
        elif found := re.match(r"\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) (\S.*?) *$", line):
            outcomes[found[1]] += 1
            if found[1] in ("FAILED", "ERROR"):
                failures.setdefault(found[2], "failed")
        elif found := re.match(r"(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*$", line):
            outcomes[found[2]] += 1
            if found[2] in ("FAILED", "ERROR"):
                failures.setdefault(found[1], "failed")
    return outcomes, failures


def smoke() -> list[str]:
    """The smoke tests but for the recorded graph."""
    return [sys.executable, str(ROOT / "benchmarks" / "smoke.py"), "--skip", "recorded"]


def memcheck(compiling: subprocess.Popen[bytes], log: Path, limit: float) -> Found:
    """The smoke tests under compute-sanitizer, with every tensor an allocation of its own, so that a read past its end
    is seen."""
    start = time.time()
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise RuntimeError("compute-sanitizer is not installed")
    with contextlib.suppress(subprocess.TimeoutExpired):
        compiling.wait(timeout=max(limit - FAREWELL, 1))
    compiling.kill()  # if it is still there
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *smoke()]
    text, status = run(command, log, limit - (time.time() - start), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    lines = [line for line in text.splitlines() if "ERROR SUMMARY" in line or "FAILED" in line]
    checks = len(re.findall(r"^[^=].*: (?:largest error|[\d.]+% differ)", text, re.MULTILINE))
    words = "; ".join(line.strip("= ") for line in lines) or "no summary"
    words += f", {checks} checks" + ("" if status is not None else f", cut after {limit:.0f} s")
    return Found(words, status == 0, {"status": status, "tail": text[-2000:]})


def run(command: Sequence[str], log: Path, limit: float, extra: dict[str, str] | None = None) -> tuple[str, int | None]:
    """What a command printed, also to the end of `log`, and its status; None if it was ended before `limit` seconds."""
    begun = log.stat().st_size
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                                   env={**os.environ, **(extra or {})})  # fmt: skip
        try:
            status: int | None = process.wait(timeout=max(limit - FAREWELL, 1))
        except subprocess.TimeoutExpired:
            status = None
            _end(process)
    with log.open("rb") as file:
        file.seek(begun)
        return file.read().decode(errors="replace"), status


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let it say what it has found so far, then end it with all processes that it has started."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=FAREWELL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
