"""`torchrun -m kvcompile run`: processes that split the heads answer what one does, and hold what it does together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]
ANSWER = ("--max-new-tokens", "12", "--raw")


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 3)
    return path


@pytest.fixture
def artifact(kvcompile: Run, model_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.kvb"
    options = ("--mem", "30%", "--context", "96", "--profile-tokens", "96", "--tp", "2")
    status, _, complaint = kvcompile("build", "--model", model_folder, *options, "-o", path)
    assert status == 0, complaint
    return path


def test_two_processes_answer_what_one_does(kvcompile: Run, artifact: Path, prompt: Path, tmp_path: Path) -> None:
    arguments = [str(one) for one in ("run", artifact, "--prompt", prompt, *ANSWER, "--json")]
    alone: dict[str, Any] = json.loads(kvcompile(*arguments)[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = tmp_path / "program.py"  # the installed package: this folder has others of its name
    program.write_text("from kvcompile import cli\ncli.main()\n")
    done = subprocess.run(
        [*command, str(program), *arguments], capture_output=True, text=True, timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)  # one process prints
    assert "rank_bytes" not in alone
    assert together["text"] == alone["text"]
    assert sum(together["rank_bytes"]) == together["cache_bytes"] == alone["cache_bytes"] == alone["artifact_bytes"]
    assert len(together["rank_bytes"]) == 2


@pytest.mark.parametrize(
    ("processes", "options", "sentence"),
    [
        (3, (), "2 KV heads do not divide among 3 ranks of tensor parallelism"),
        (2, ("--compare",), "--compare is for one process, and there are 2"),
        (2, ("--device-map", "auto"), "2 processes split the model among them, and --device-map would spread it once"),
    ],
)
def test_what_several_processes_cannot_do_is_one_sentence(
    kvcompile: Run, artifact: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch,
    processes: int, options: tuple[str, ...], sentence: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    status, said, complaint = kvcompile("run", artifact, "--prompt", prompt, *options)
    assert (status, said) == (2, "")
    assert sentence in complaint


def test_a_device_map_is_transformers_own(kvcompile: Run, artifact: Path, prompt: Path) -> None:
    pytest.importorskip("accelerate")
    arguments = ("run", artifact, "--prompt", prompt, *ANSWER, "--json")
    alone, spread = (json.loads(kvcompile(*arguments, *more)[1]) for more in ((), ("--device-map", "auto")))
    assert (alone["text"], alone["cache_bytes"]) == (spread["text"], spread["cache_bytes"])
    status, _, complaint = kvcompile(*arguments, "--device-map", "nowhere")
    assert status == 2
    assert "nowhere" in complaint
