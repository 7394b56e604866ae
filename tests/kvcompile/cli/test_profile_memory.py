"""`kvcompile build --profile-memory`: the same file by streaming, killed or not, and a sentence for what goes wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from kvcompile.models import load
from kvcompile.models.checkpoint import INDEX
from kvcompile.models.resident import is_streamed

Run = Callable[..., tuple[int, str, str]]

BUILD = ("--mem", "30%", "--context", "96", "--profile-tokens", "96")


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model in several files."""
    folder = tmp_path / "sharded"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / INDEX).exists()
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that no other test has profiled into."""
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_that_does_not_fit_is_streamed(folder: Path) -> None:
    for memory, streamed in ((1_000_000, True), (1 << 40, False), (None, False)):
        assert is_streamed(load(str(folder), memory=memory).model.get_input_embeddings()) == streamed
    whole = load(str(folder), device="cpu", memory=1 << 40).model
    assert all(weight.data_ptr() % 64 == 0 for weight in whole.parameters()), "no longer where the files are mapped"


def test_streaming_gives_the_same_file(kvcompile: Run, folder: Path, tmp_path: Path, own: Path) -> None:
    files = []
    for number, memory in enumerate(([], ["--profile-memory", "1MB"])):
        shutil.rmtree(own, ignore_errors=True)
        files.append(tmp_path / f"{number}.kvb")
        assert kvcompile("build", "--model", folder, *BUILD, *memory, "-o", files[-1])[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("allocator", "options"), [("baklava", []), ("optimal", ["--refine", "1"]), ("optimal", ["--calib", __file__])]
)
def test_what_measures_with_the_model_streams_too(
    kvcompile: Run, folder: Path, tmp_path: Path, own: Path, allocator: str, options: list[str]
) -> None:
    given = ["build", "--model", folder, *BUILD, "--allocator", allocator, *options]
    for name, memory in (("whole", []), ("streamed", ["--profile-memory", "1MB"])):
        assert kvcompile(*given, *memory, "-o", tmp_path / f"{name}.kvb")[0] == 0
    assert (tmp_path / "whole.kvb").read_bytes() == (tmp_path / "streamed.kvb").read_bytes()


def test_a_build_that_is_killed_20_times_ends_with_the_same_bytes() -> None:
    """SIGKILL at moments drawn from the whole of its run, streamed, so that states between the passes are on disk."""
    script = Path(__file__).parents[3] / "benchmarks" / "killed_build.py"
    done = subprocess.run([sys.executable, script, "--streamed"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nkilled at") == 20


def sentence(result: tuple[int, str, str]) -> str:
    status, out, err = result
    assert (status, out) == (2, "")
    (line,) = err.strip().splitlines()
    return line


@pytest.mark.parametrize("damage", ["cut", "gone", "index"])
def test_a_broken_checkpoint_is_one_sentence(kvcompile: Run, folder: Path, tmp_path: Path, damage: str) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[1]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "gone":
        file.unlink()
    else:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = dict.fromkeys(index["weight_map"], file.name)
        (folder / INDEX).write_text(json.dumps(index))
    for memory in ([], ["--profile-memory", "1MB"]):
        said = sentence(kvcompile("build", "--model", folder, *BUILD, *memory, "-o", tmp_path / "a.kvb"))
        assert file.name in said


def test_a_full_disk_is_one_sentence(folder: Path, tmp_path: Path, own: Path) -> None:
    """A limit of the system's on the size of files does what a full disk does."""
    command = [sys.executable, "-m", "kvcompile", "build", "--model", folder, *BUILD, "--profile-memory", "1MB"]
    done = subprocess.run(
        [*map(str, command), "-o", str(tmp_path / "a.kvb")], capture_output=True, text=True, env=os.environ.copy(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )  # fmt: skip
    said = sentence((done.returncode, done.stdout, done.stderr))
    assert "cannot be written to" in said
    assert "KVCOMPILE_CACHE" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "x", "--profile-memory", "much"], "'much' is no amount of memory"),
        (["--model", "x", "--profile-memory", "50%"], "'50%' is a share: expected bytes"),
        (["--from", "x.kvb", "--profile-memory", "8GB"], "--profile-memory is about profiling the model"),
        (["--from", "x.kvb", "--quick"], "--quick is about profiling the model: give --model NAME"),
    ],
)
def test_wrong_amounts_are_refused(kvcompile: Run, options: list[str], said: str) -> None:
    assert said in sentence(kvcompile("build", "--mem", "50%", *options))
