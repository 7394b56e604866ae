"""Artifacts on the hub, played by a stand-in on loopback; a process each, for the hub's settings are read at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import TOKEN

from kvcompile.artifacts import read
from kvcompile.artifacts.hub import Place, parse_place

REFERENCES = sorted((Path(__file__).parents[2] / "artifacts" / "reference").glob("*.kvb"))
SCRIPT = """
import json, sys
from kvcompile.artifacts import KvcompileError, fetch, push

for call in sys.argv[1:]:
    verb, *rest = call.split("|")
    try:
        print(json.dumps(push(*rest) if verb == "push" else fetch(rest[0]).model.fingerprint))
    except KvcompileError as error:
        print(json.dumps("error: " + str(error)))
"""


def say(folder: Path, endpoint: str, *calls: str, **environment: str) -> list[Any]:
    """What `push|FILE|REPO` and `fetch|NAME` give in a fresh process with its caches under `folder`."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("proxy")}
    settings = {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *calls], env=clean | settings | environment, cwd=folder, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Fetching" not in done.stderr  # progress is for terminals
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("owner/name", Place("owner/name", None, None)),
        ("owner/na.me-1@v1.0", Place("owner/na.me-1", "v1.0", None)),
        ("owner/name@refs/pr/1:deep/a.kvb", Place("owner/name", "refs/pr/1", "deep/a.kvb")),
        ("owner/name:a.kvb", Place("owner/name", None, "a.kvb")),
        ("folder/a.kvb", None),
        ("a.kvb", None),
        ("./folder/name", None),
        ("/folder/name", None),
        ("~/name", None),
        ("a/b/c", None),
        ("owner/na me", None),
        ("", None),
    ],
)
def test_names(source: str, place: Place | None) -> None:
    assert parse_place(source) == place


def test_push_and_load_again(hub_server: Any, tmp_path: Path) -> None:
    file = REFERENCES[0]
    commit, loaded, exact = say(
        tmp_path, hub_server.url, f"push|{file}|tiny/cache", "fetch|tiny/cache", f"fetch|tiny/cache@main:{file.name}"
    )
    assert commit.startswith(f"{hub_server.url}/tiny/cache/commit/")
    assert loaded == exact == read(file).model.fingerprint
    stored = hub_server.repos["tiny/cache"]
    assert (stored / file.name).read_bytes() == file.read_bytes()
    card = (stored / "README.md").read_text()
    assert "library_name: kvcompile" in card
    assert f'attach(model, "tiny/cache:{file.name}")' in card

    # A card that is there stays, and with two artifacts a name is needed.
    (stored / "README.md").write_text("mine")
    (_, unclear, missing) = say(
        tmp_path, hub_server.url, f"push|{REFERENCES[1]}|tiny/cache", "fetch|tiny/cache", "fetch|tiny/cache:other.kvb"
    )
    assert (stored / "README.md").read_text() == "mine"
    assert "tiny/cache has these artifacts: " in unclear
    assert all(reference.name in unclear for reference in REFERENCES)
    assert "name one as tiny/cache:FILE.kvb" in missing

    hub_server.shutdown()
    hub_server.server_close()
    cached, other = say(
        tmp_path, hub_server.url, f"fetch|tiny/cache:{file.name}", "fetch|tiny/other", HF_HUB_OFFLINE="1"
    )
    assert cached == loaded
    assert "there is no file tiny/other, tiny/other is not in the local cache, and the hub is out of reach" in other


def test_refusals(hub_server: Any, tmp_path: Path) -> None:
    hub_server.repos["tiny/empty"] = tmp_path / "empty"
    (tmp_path / "empty").mkdir()
    hub_server.gated.add("tiny/gated")
    damaged = tmp_path / "damaged.kvb"
    damaged.write_bytes(REFERENCES[0].read_bytes()[:-1])
    answers = say(
        tmp_path, hub_server.url, "fetch|tiny/missing", "fetch|tiny/gated", "fetch|tiny/empty", "fetch|tiny/empty@v9",
        f"push|{damaged}|tiny/cache", f"push|{REFERENCES[0]}|cache", f"push|{REFERENCES[0]}|a/b/c", "fetch|no.kvb",
    )  # fmt: skip
    expected = (
        "the hub has no public artifact tiny/missing", "the artifact tiny/gated is gated",
        "tiny/empty has these artifacts: none", "tiny/empty has no revision 'v9'", "damaged.kvb", "expected owner/name",
        "expected owner/name", "no.kvb: the file cannot be read",
    )  # fmt: skip
    for answer, message in zip(answers, expected, strict=True):
        assert answer.startswith("error: ")
        assert message in answer
    assert "tiny/cache" not in hub_server.repos
    (refused,) = say(tmp_path, hub_server.url, f"push|{REFERENCES[0]}|tiny/cache", HF_TOKEN="hf_other")
    assert "tiny/cache takes no upload" in refused
    assert "hf auth login" in refused
