"""The commands, as a user calls them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvcompile.artifacts import prefill_bytes, read
from kvcompile.effort import QUICK, THOROUGH


@pytest.fixture(scope="module")
def artifact(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kvcompile.compiler import build
    from kvcompile.models import load

    loaded = load(str(model_folder))
    out = tmp_path_factory.mktemp("artifacts") / "tiny.kvb"
    build(loaded.model, loaded.tokenizer, mem="30%", context=192, out=out, name=loaded.name)
    return out


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("All work and no play makes the cache a dull place. " * 3, encoding="utf-8")
    return path


def test_build_writes_a_valid_artifact_and_says_what_it_did(
    kvcompile, model_folder, tmp_path, tmp_path_factory, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "KVCOMPILE_CACHE", str(tmp_path_factory.mktemp("cache"))
    )  # so that there is something to profile
    status, out, err = kvcompile("build", "--model", model_folder, "--mem", "30%", "--context", 192)
    assert status == 0
    assert [line for line in err.splitlines() if "so far" not in line] == ["profiling ...", "solving ..."]
    path = tmp_path / f"{model_folder.name}.kvb"
    plan = read(path)
    assert str(plan.bytes.resident) in out
    assert str(plan.target.bytes) in out
    assert "gap" in out
    assert os.listdir(tmp_path) == [path.name]


def test_a_quick_build_says_that_it_is_one(kvcompile, model_folder, tmp_path, tmp_path_factory, monkeypatch) -> None:
    """In what it says, in the file and in what is solved from that; and its profile does not pass for the other."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KVCOMPILE_CACHE", str(cache))
    given = ("build", "--model", model_folder, "--context", 96, "--mem", "30%", "-o", tmp_path / "a.kvb")
    status, out, _ = kvcompile(*given, "--quick")
    quick = read(tmp_path / "a.kvb")
    assert (status, quick.calibration["quick"]) == (0, QUICK.gives_up)
    assert QUICK.gives_up in out
    assert kvcompile("build", "--from", tmp_path / "a.kvb", "--mem", "50%", "-o", tmp_path / "b.kvb")[0] == 0
    assert read(tmp_path / "b.kvb").calibration["quick"] == QUICK.gives_up
    assert json.loads(kvcompile("inspect", tmp_path / "b.kvb", "--json")[1])["calibration"]["quick"] == QUICK.gives_up

    assert len(list(cache.glob("profiles/*"))) == 1
    status, out, _ = kvcompile(*given)
    assert (status, len(list(cache.glob("profiles/*")))) == (0, 2)
    assert "  quick " not in out
    thorough = read(tmp_path / "a.kvb")
    assert "quick" not in thorough.calibration
    assert quick.calibration["sources"] == thorough.calibration["sources"][:: QUICK.every]
    for artifact, effort in ((thorough, THOROUGH), (quick, QUICK)):
        calibration = artifact.calibration
        assert calibration["episodes"] == len(calibration["sources"]) * (effort.fit + effort.measure)
        assert calibration["probes"] == effort.probes
    plans = [len(artifact.calibration["checked_plans"]) for artifact in (thorough, quick)]
    assert plans == [THOROUGH.checks, QUICK.checks]


def test_build_json(kvcompile, model_folder, tmp_path) -> None:
    path = tmp_path / "a.kvb"
    command = ("build", "--model", model_folder, "--mem", "4kB", "--context", 192, "-o", path, "--json")
    status, out, _ = kvcompile(*command, "--kv-dtype", "bf16", "--allocator", "uniform")
    report = json.loads(out)
    assert status == 0
    assert report["target_bytes"] == 4000 >= report["resident_bytes"] == read(path).bytes.resident
    assert (report["dtype"], report["solver"]["allocator"]) == ("bfloat16", "uniform")


def test_build_from_an_artifact(kvcompile, artifact, tmp_path) -> None:
    out = tmp_path / "b.kvb"
    status, *_ = kvcompile("build", "--from", artifact, "--mem", "60%", "-o", out, "--allocator", "squeeze")
    assert status == 0
    assert read(out).target.bytes == read(artifact).bytes.full * 60 // 100


def test_squeeze_with_a_plain_sliding_window(kvcompile, artifact, tmp_path) -> None:
    out = tmp_path / "b.kvb"
    command = ("build", "--from", artifact, "--mem", "30%", "-o", out, "--allocator", "squeeze", "--policy", "window")
    assert kvcompile(*command)[0] == 0
    budgets = read(out).budgets
    assert not budgets.sink.any()
    assert (budgets.recent == budgets.capacity).all()


@pytest.mark.parametrize("targets", [("--mem", "20%,4kB"), ("--mem", "20%", "--mem", "4kB")])
def test_several_targets_write_a_file_each(kvcompile, artifact, tmp_path, targets) -> None:
    status, out, _ = kvcompile("build", "--from", artifact, *targets, "-o", tmp_path / "x.kvb", "--json")
    assert status == 0
    assert sorted(os.listdir(tmp_path)) == ["x-20pct.kvb", "x-4kB.kvb"]
    reports = json.loads(out)
    assert [Path(report["artifact"]).name for report in reports] == ["x-20pct.kvb", "x-4kB.kvb"]
    assert reports[1]["target_bytes"] == 4000


def test_build_for_the_sequences_of_an_engine(kvcompile, artifact, model_folder, tmp_path) -> None:
    options = ("--mem", "60kB", "--sequences", 4, "--context", 192)
    for source in (("--from", artifact), ("--model", model_folder)):
        status, out, _ = kvcompile("build", *source, *options, "-o", tmp_path / "b.kvb")
        assert status == 0
        assert "for each of 4 sequences at once" in out
        target = read(tmp_path / "b.kvb").target
        assert (target.batch, target.context) == (1, 192)
        assert 60_000 // 5 - 1500 < target.bytes < 60_000 // 5


def test_solving_anew_takes_no_torch(artifact, tmp_path) -> None:
    code = (
        "import sys; from kvcompile import cli; sys.argv = sys.argv[1:]\n"
        "try: cli.main()\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules), 'loaded in vain'"
    )
    command = ["kvcompile", "build", "--from", artifact, "--mem", "40%", "-o", tmp_path / "b.kvb"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_run_streams_the_answer_and_reports_on_stderr(kvcompile, artifact, prompt) -> None:
    status, out, err = kvcompile("run", artifact, "--prompt", prompt, "--max-new-tokens", 12)
    assert status == 0
    assert out.strip()
    assert f"{read(artifact).bytes.resident} bytes" in err
    assert "target" in err


def test_a_prompt_longer_than_the_context_is_answered_with_a_note(kvcompile, artifact, tmp_path) -> None:
    (tmp_path / "long.txt").write_text("a" * 200)
    status, out, err = kvcompile("run", artifact, "--prompt", tmp_path / "long.txt", "--max-new-tokens", 3, "--raw")
    assert status == 0
    assert out.strip()
    assert "note: the prompt has 200 tokens, more than the 192 that the artifact was built for" in err.splitlines()[0]


def test_run_json_and_sampling(kvcompile, artifact, prompt) -> None:
    command = ("run", artifact, "--prompt", prompt, "--max-new-tokens", 9, "--json", "--temperature", 1)
    results = [json.loads(kvcompile(*command, "--seed", seed)[1]) for seed in (1, 1, 2)]
    assert results[0]["text"] == results[1]["text"] != results[2]["text"]
    assert results[0]["new_tokens"] == 9
    assert results[0]["cache_bytes"] == results[0]["artifact_bytes"] <= results[0]["target_bytes"]


def test_run_in_chunks_says_the_same_and_promises_less(kvcompile, artifact, prompt) -> None:
    command = ("run", artifact, "--prompt", prompt, "--max-new-tokens", 9, "--json")
    whole, chunks = (json.loads(kvcompile(*command, *more)[1]) for more in ((), ("--prefill-chunk", 16)))
    assert chunks["text"] == whole["text"]
    assert 0 < chunks["prefill_bytes"] < whole["prefill_bytes"]
    err = kvcompile(*command[:-1], "--prefill-chunk", 16)[2]
    assert "reading the prompt: at most" in err


def test_run_cuts_the_prompt_on_the_way_and_promises_less(kvcompile, artifact, prompt) -> None:
    command = ("run", artifact, "--prompt", prompt, "--max-new-tokens", 9, "--json")
    short, cut = (json.loads(kvcompile(*command, "--prefill-cut-every", n)[1]) for n in (10_000, 16))
    assert short["text"] == json.loads(kvcompile(*command)[1])["text"]
    assert cut["new_tokens"] == 9
    assert cut["cache_bytes"] == short["cache_bytes"]
    plan = read(artifact)
    figures = {n: prefill_bytes(plan, 1, 4096, cut_every=n) for n in (None, 512, 64)}
    assert figures[64] < figures[512] < figures[None]
    status, _, err = kvcompile(*command, "--prefill-cut-every", 0)
    assert status == 2
    assert "--prefill-cut-every" in err


def test_run_equals_plain_generation_at_a_full_target(kvcompile, artifact, prompt, model_folder, tmp_path) -> None:
    from kvcompile.models import load

    out = tmp_path / "full.kvb"
    kvcompile("build", "--from", artifact, "--mem", "100%", "-o", out)
    text = json.loads(kvcompile("run", out, "--prompt", prompt, "--max-new-tokens", 30, "--json", "--raw")[1])["text"]
    loaded = load(str(model_folder))
    ids = loaded.tokenizer(prompt.read_text(), return_tensors="pt").input_ids
    plain = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    assert text == loaded.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)


def test_inspect(kvcompile, artifact) -> None:
    status, out, _ = kvcompile("inspect", artifact)
    assert status == 0
    plan = read(artifact)
    assert "llama" in out
    assert all(str(tokens) in out for tokens in plan.budgets.capacity.flat)
    report = json.loads(kvcompile("inspect", artifact, "--json")[1])
    assert report["heads"]["capacity"] == plan.budgets.capacity.tolist()
    assert report["heads"]["k_bits"] == plan.budgets.k_bits.tolist()
    assert report["resident_bytes"] == plan.bytes.resident
    assert report["prefill_bytes"] == prefill_bytes(plan, 1, 192) > plan.bytes.transient
    assert report["quantised_positions"] == plan.target.context


def test_verify(kvcompile, artifact, model_folder) -> None:
    assert kvcompile("verify", artifact)[0] == 0
    report = json.loads(kvcompile("verify", artifact, "--model", model_folder, "--json")[1])
    assert report["measured_bytes"] == report["resident_bytes"]


def test_verify_notices_another_model(kvcompile, artifact, model_folder, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1.001
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for command in (("verify", artifact, "--model", other), ("run", artifact, "--prompt", __file__, "--model", other)):
        refused(kvcompile(*command), "weights")


def refused(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


BUILD = ("build", "--context", "192", "-o", "{out}")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((*BUILD, "--mem", "25%", "--model", "no-such-model"), "no-such-model"),
        ((*BUILD, "--mem", "25%", "--model", "./nowhere.gguf"), "nowhere.gguf"),
        ((*BUILD, "--mem", "8XB", "--model", "{model}"), "8XB"),
        ((*BUILD, "--mem", "0", "--model", "{model}"), "more than zero"),
        ((*BUILD, "--mem", "100", "--model", "{model}"), "sinks"),
        ((*BUILD, "--mem", "0.3%", "--model", "{model}"), "sinks"),
        ((*BUILD, "--mem", "25%", "--model", "{model}", "--calib", "/no/such/text"), "/no/such/text"),
        ((*BUILD, "--mem", "25%", "--model", "{model}", "--allocator", "duo", "--policy", "h2o"), "duo"),
        ((*BUILD, "--mem", "25%", "--model", "{model}", "--kv-dtype", "int5"), "int5"),
        ((*BUILD, "--mem", "25%", "--model", "{model}", "--batch", "0"), "--batch"),
        ((*BUILD, "--mem", "8GB", "--model", "{model}", "--batch", "2", "--sequences", "2"), "give one of them"),
        ((*BUILD, "--mem", "25%", "--model", "{model}", "--sequences", "2"), "expected bytes such as 8GB"),
        ((*BUILD, "--mem", "8GB,25%", "--from", "{artifact}", "--sequences", "2"), "expected bytes such as 8GB"),
        ((*BUILD, "--mem", "2kB", "--from", "{artifact}", "--sequences", "2"), "for 2 sequences at once"),
        ((*BUILD, "--mem", "25%,25%", "--model", "{model}"), "twice"),
        ((*BUILD, "--mem", "25%,25.0%", "--model", "{model}"), "twice"),
        ((*BUILD, "--mem", "25%,8XB", "--model", "{model}"), "8XB"),
        ((*BUILD, "--mem", "25%", "--model", "{model}", "--tp", "5"), "divide"),
        ((*BUILD, "--mem", "25%", "--from", "{artifact}", "--refine", "1"), "--refine"),
        ((*BUILD, "--mem", "25%"), "--model"),
        ((*BUILD, "--mem", "25%", "--from", "no.kvb"), "no.kvb"),
        (("build", "--mem", "25%", "--model", "{model}", "-o", "/no/folder/a.kvb"), "/no/folder"),
        (("run", "{artifact}", "--prompt", "{empty}"), "empty"),
        (("run", "{artifact}", "--prompt", "no-prompt.txt"), "no-prompt.txt"),
        (("run", "no.kvb", "--prompt", "{empty}"), "no.kvb"),
        (("run", "{cut}", "--prompt", "{empty}"), "cut.kvb"),
        (("inspect", "{cut}"), "cut.kvb"),
        (("inspect", "{artifact}", "--html", "/no/folder/a.html"), "/no/folder"),
        (("eval", "{artifact}", "--allocators", "best"), "best"),
        (("eval", "{artifact}", "--mem", "0.3%"), "sinks"),
        (("eval", "{artifact}", "--data", "{empty}"), "empty"),
        (("eval", "{artifact}", "--json", "/no/folder/a.json"), "/no/folder"),
        (("eval", "{artifact}", "--plot", "a.bmp"), "a.bmp"),
        (("verify", "{flipped}"), "flipped.kvb"),
        (("verify", "{model}"), "tiny-llama"),
        (("frobnicate",), "frobnicate"),
        (("inspect", "{artifact}", "--frobnicate"), "--frobnicate"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_mistakes_are_refused_in_one_sentence(kvcompile, artifact, model_folder, tmp_path, arguments, word) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    whole = artifact.read_bytes()
    (tmp_path / "cut.kvb").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.kvb").write_bytes(whole[:99] + bytes([whole[99] ^ 4]) + whole[100:])
    before = sorted(os.listdir(tmp_path))
    places = {
        "out": tmp_path / "out.kvb", "model": model_folder, "artifact": artifact, "empty": tmp_path / "empty.txt",
        "cut": tmp_path / "cut.kvb", "flipped": tmp_path / "flipped.kvb",
    }  # fmt: skip
    refused(kvcompile(*(argument.format(**places) for argument in arguments)), word)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_killed_build_leaves_nothing(model_folder, tmp_path) -> None:
    """SIGKILL in the middle of the profile."""
    environment = {**os.environ, "KVCOMPILE_CACHE": str(tmp_path / "cache")}
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "kvcompile", "build", "--model", model_folder, "--mem", "30%", "-o", out / "a.kvb"]
    process = subprocess.Popen(command, env=environment, cwd=out, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (started := list((tmp_path / "cache").glob("profiles/*/*"))) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert started
    assert [path.name for path in out.iterdir() if path.name != "a.kvb"] == []
    if (out / "a.kvb").exists():  # the machine was faster than the signal: then the file is whole
        read(out / "a.kvb")


def test_help_names_every_command(kvcompile) -> None:
    status, out, _ = kvcompile("--help")
    assert status == 0
    assert all(name in out for name in ("build", "run", "eval", "inspect", "verify"))
    assert "--allocator" in kvcompile("build", "--help")[1]
