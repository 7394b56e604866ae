"""What commands read and print: prompts, numbers of bytes, options that do not go together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcompile.artifacts import CacheError
from kvcompile.cli.output import approximate
from kvcompile.cli.run import read_prompt

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_line_breaks_that_end_a_file_are_no_part_of_a_message(tmp_path: Path, end: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(f"One line.\n  Another? {end}".encode())
    assert read_prompt(str(file), raw=False) == "One line.\n  Another? "
    assert read_prompt(str(file), raw=True) == "One line.\n  Another? " + "\n" * end.count("\n")


@pytest.mark.parametrize(
    ("size", "shown"),
    [(999, "999 bytes"), (1000, "1 kB"), (999_499, "999 kB"), (999_944, "1 MB"), (1_234_567, "1.23 MB")],
)
def test_bytes_have_three_digits(size: int, shown: str) -> None:
    assert approximate(size) == shown


@pytest.mark.parametrize("option", [("--mem", "50%"), ("--widths", "4")])
def test_options_for_random_weights_are_refused_beside_an_artifact(kvcompile, option) -> None:
    status, out, err = kvcompile("bench", REFERENCE, *option)
    assert (status, out) == (2, "")
    assert "--mem and --widths are for --random-weights" in err


def test_a_place_that_cannot_be_written_is_refused_before_an_export(kvcompile, tmp_path, monkeypatch) -> None:
    from kvcompile import export

    monkeypatch.setattr(export, "export", lambda *_: pytest.fail("the export has begun"))
    status, out, err = kvcompile("export", REFERENCE, "--to", "headkv", "-o", tmp_path / "none" / "x.json")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "none" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", REFERENCE, "--prompt", "x.txt", "--seed", 2**64), "Invalid value for '--seed'"),
        (("eval", REFERENCE, "--data", "nowhere"), "there is no text at nowhere"),
        (("bench", "--random-weights", "smollm2-135m", "--model", "x"), "--model is for an artifact"),
        (("push", REFERENCE, "owner/name", "--name", "../x.kvb"), "a file that ends in .kvb"),
        (("eval", REFERENCE, "--context", 1024, "--mem", ","), "nothing is left to measure in 1024 tokens"),
    ],
    ids=["seed", "data", "model", "name", "nothing"],
)
def test_mistakes_are_found_before_anything_is_loaded(kvcompile, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = kvcompile(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert words in err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["Python", "GPU", "CPU"],
)
def test_memory_that_is_not_there_is_one_sentence(kvcompile, monkeypatch, error: Exception) -> None:
    def fails(**_: object) -> None:
        raise error

    monkeypatch.setattr(sys.modules["kvcompile.cli.main"], "cli", fails)
    status, out, err = kvcompile()
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert "there is not enough memory" in err


def test_a_closed_standard_input_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(CacheError, match="there is no standard input"):
        read_prompt("-", raw=False)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "process 2 of 2"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "1 of 1 on this machine"),
    ],
    ids=["letter", "negative", "rank", "local"],
)
@pytest.mark.parametrize(
    "arguments",
    [("run", REFERENCE, "--prompt", __file__), ("build", "--model", "smollm2-135m", "--mem", "25%", "-o", "x.kvb")],
    ids=["run", "build"],
)
def test_what_torchrun_would_not_set_is_one_sentence(
    kvcompile, tmp_path, monkeypatch, variables, words, arguments
) -> None:
    from kvcompile import models

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model is being loaded"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, out, err = kvcompile(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert words in err


def test_a_launcher_may_leave_out_how_many_processes_a_machine_has(monkeypatch) -> None:
    from kvcompile.cli.launched import Launched, launched

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Launched(0, 1, 1, 1)


def test_processes_that_cannot_meet_are_one_sentence(kvcompile, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = kvcompile("build", "--model", "smollm2-135m", "--mem", "25%")
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert "cannot meet" in err
    assert "start them with torchrun" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [("inspect", REFERENCE), ("inspect", REFERENCE, "--json"), ("--help",)])
def test_an_output_that_is_full_is_one_sentence(arguments) -> None:
    program = [sys.executable, "-c", "from kvcompile import cli; cli.main()", *map(str, arguments)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert "does not fit (No space left on device)" in done.stderr
