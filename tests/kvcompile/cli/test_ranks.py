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


def torchrun(cache: Path, count: int, *arguments: object, every: float = 20.0) -> subprocess.Popen[str]:
    """Start `kvcompile build` in so many processes, which save themselves every so many seconds."""
    program = cache.with_suffix(".py")
    program.write_text(
        f"from kvcompile.profile import job; job.SAVE_EVERY = {every}\nfrom kvcompile import cli; cli.main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KVCOMPILE_CACHE": str(cache)}
    return subprocess.Popen(
        [*map(str, command), str(program), "build", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that one process of one thread writes."""
    folder = tmp_path_factory.mktemp("alone")
    process = torchrun(folder / "cache", 1, "--model", model_folder, *BUILD, "-o", folder / "alone.kvb")
    _, complaint = process.communicate(timeout=1200)
    assert process.returncode == 0, complaint
    return (folder / "alone.kvb").read_bytes()


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_the_same_file(
    kvcompile: Run, alone: bytes, model_folder: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, cache = tmp_path / "together.kvb", tmp_path / "together"
    process = torchrun(cache, count, "--model", model_folder, *BUILD, "--profile-memory", "1MB", "-o", out)
    said, complaint = process.communicate(timeout=1200)
    assert process.returncode == 0, complaint
    assert said.count("together.kvb") == 1, "one process reports"
    assert out.read_bytes() == alone
    kept = sorted(path.name for path in (tmp_path / "together").glob("profiles/*/*"))
    assert [name for name in kept if not name.startswith("rotary")] == ["sums.npz"]
    # The finished profile serves one process too.
    monkeypatch.setenv("KVCOMPILE_CACHE", str(cache))
    assert kvcompile("build", "--model", model_folder, *BUILD, "-o", tmp_path / "again.kvb")[0] == 0
    assert (tmp_path / "again.kvb").read_bytes() == alone


def test_a_lost_process_ends_the_build_and_the_work_is_kept(alone: bytes, model_folder: Path, tmp_path: Path) -> None:
    out, cache, arguments = tmp_path / "together.kvb", tmp_path / "together", ["--model", model_folder, *BUILD]
    process = torchrun(cache, 2, *arguments, "-o", out, every=0.1)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "together").glob("profiles/*/sums-2.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=600)
    assert process.returncode != 0
    assert not out.exists()
    (kept,) = (tmp_path / "together").glob("profiles/*/sums-2.npz")
    assert kept.exists()
    process = torchrun(cache, 2, *arguments, "-o", out)
    _, complaint = process.communicate(timeout=1200)
    assert process.returncode == 0, complaint
    assert out.read_bytes() == alone
    shutil.rmtree(tmp_path / "together")
