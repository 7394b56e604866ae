"""`kvcompile export --to onnx` and the example that runs what it writes, as a user runs them, on a tiny model."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvcompile.artifacts import read
from kvcompile.models import load
from kvcompile.runtime import attach, generate

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

EXAMPLE = Path(__file__).parents[4] / "examples" / "onnx_generate.py"
TEXT = "The cache of a model holds what it has read. " * 4
WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert "torch" not in sys.modules and "transformers" not in sys.modules and "onnx" not in sys.modules
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def artifact(kvcompile: Command, model_folder: Path, tmp_path: Path) -> Path:
    out = tmp_path / "tiny.kvb"
    build = ["build", "--model", model_folder, "--mem", "50%", "--context", "128", "--kv-dtype", "fp32", "-o", out]
    assert kvcompile(*build)[0] == 0
    return out


def run_example(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, EXAMPLE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_the_example_says_what_the_runtime_says(
    kvcompile: Command, artifact: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder, prompt = tmp_path / "onnx", tmp_path / "prompt.txt"
    status, out, _ = kvcompile("export", artifact, "--to", "onnx", "--model", model_folder, "-o", folder, "--json")
    assert status == 0
    report, plan = json.loads(out), read(artifact)
    assert report["cache_bytes"] == plan.bytes.resident
    assert report["weight_bytes"] == (folder / "model.onnx.data").stat().st_size
    prompt.write_text(TEXT)
    loaded = load(str(model_folder), dtype=torch.float32, device="cpu")
    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids.shape[1] > 128  # longer than the context, so every head has to let go of something
    with attach(loaded.model, plan, references=False) as kv:  # which takes more than standard operators
        expected = generate(loaded.model, kv.new_cache(), ids, max_new_tokens=24, eos=[256])[0]
    done = run_example(folder, "--prompt", prompt, "--max-new-tokens", 24)
    assert done.returncode == 0, done.stderr
    text = loaded.tokenizer.decode(expected, skip_special_tokens=True)
    assert done.stdout.rstrip("\n") == text.rstrip("\N{REPLACEMENT CHARACTER}").rstrip("\n")
    assert f"cache: {plan.bytes.resident} bytes" in done.stderr
    chunked = run_example(folder, "--prompt", prompt, "--max-new-tokens", 4, "--chunk", 50)
    assert chunked.returncode == 0, chunked.stderr


def test_the_example_needs_onnxruntime_and_tokenizers_alone() -> None:
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    found = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    found |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    # numpy comes with onnxruntime.
    assert found - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "tokenizers"}


def test_a_report_for_people(kvcompile: Command, artifact: Path, model_folder: Path, tmp_path: Path) -> None:
    status, out, err = kvcompile("export", artifact, "--to", "onnx", "--model", model_folder, "-o", tmp_path / "onnx")
    assert (status, err) == (0, "")
    assert "nothing" in out
    assert "as the artifact promises" in out


def test_mistakes_are_one_sentence(
    kvcompile: Command, artifact: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    onnx = ["export", artifact, "--to", "onnx", "-o", out]
    cases = [
        ([*onnx, "--model", "no-such-model"], "there is no model 'no-such-model'"),
        (["export", artifact, "--to", "headkv", "--model", model_folder, "-o", out], "--model is for onnx alone"),
        (["export", artifact, "--to", "gguf", "-o", out], "expected one of onnx, duoattention"),
    ]
    for arguments, words in cases:
        status, stdout, err = kvcompile(*arguments)
        assert (status, stdout) == (2, "")
        assert words in err
        assert "Traceback" not in err
    for name in [name for name in sys.modules if name.startswith(("kvcompile.export.onnx", "onnx"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, _, err = kvcompile(*onnx, "--model", model_folder)
    assert status == 2
    assert "pip install onnx" in err
    assert not out.exists()
