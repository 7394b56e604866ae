"""`torchrun -m kvcompile build`: several processes over gloo write the file that one writes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]

BUILD = ("--mem", "30%", "--context", "96", "--profile-tokens", "96")


def torchrun(count: int, *arguments: object, every: float = 20.0) -> subprocess.Popen[str]:
    """Start `kvcompile build` in so many processes, which save themselves every so many seconds."""
    program = Path(os.environ["KVCOMPILE_CACHE"]).parent / "program.py"
    program.write_text(
        f"from kvcompile.profile import job; job.SAVE_EVERY = {every}\nfrom kvcompile import cli; cli.main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    return subprocess.Popen(
        [*map(str, command), str(program), "build", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def alone(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The file that one process of one thread writes; then the cache folder is a new one."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "alone"))
    out = tmp_path / "alone.kvb"
    process = torchrun(1, "--model", model_folder, *BUILD, "-o", out)
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "together"))
    return out.read_bytes()


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_the_same_file(
    kvcompile: Run, alone: bytes, model_folder: Path, tmp_path: Path, count: int
) -> None:
    out = tmp_path / "together.kvb"
    process = torchrun(count, "--model", model_folder, *BUILD, "--profile-memory", "1MB", "-o", out)
    said, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    assert said.count("together.kvb") == 1, "one process reports"
    assert out.read_bytes() == alone
    kept = sorted(path.name for path in (tmp_path / "together").glob("profiles/*/*"))
    assert [name for name in kept if not name.startswith("rotary")] == ["sums.npz"]
    # The finished profile serves one process too.
    assert kvcompile("build", "--model", model_folder, *BUILD, "-o", tmp_path / "again.kvb")[0] == 0
    assert (tmp_path / "again.kvb").read_bytes() == alone


def test_a_lost_process_ends_the_build_and_the_work_is_kept(alone: bytes, model_folder: Path, tmp_path: Path) -> None:
    out, arguments = tmp_path / "together.kvb", ["--model", model_folder, *BUILD]
    process = torchrun(2, *arguments, "-o", out, every=0.1)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "together").glob("profiles/*/sums-2.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not out.exists()
    (kept,) = (tmp_path / "together").glob("profiles/*/sums-2.npz")
    assert kept.exists()
    process = torchrun(2, *arguments, "-o", out)
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == 0, complaint
    assert out.read_bytes() == alone
    shutil.rmtree(tmp_path / "together")
