"""The reader in JavaScript, where node is installed, against ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_models import CONFIGS, make_artifact, tiny_model

from kvcompile.artifacts import POLICIES, read, write

ROOT = Path(__file__).parents[2]
READER = ROOT / "examples" / "read_kvb.mjs"
REFERENCES = sorted((ROOT / "artifacts" / "reference").glob("*.kvb"))

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def read_with_node(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["node", READER, file], capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("file", REFERENCES, ids=lambda file: file.name)
def test_budgets_order_and_metadata_are_ours(file: Path) -> None:
    done = read_with_node(file)
    assert done.returncode == 0, done.stderr
    found, ours = json.loads(done.stdout), read(file)
    metadata, budgets = found["metadata"], ours.budgets
    assert metadata["model"]["fingerprint"] == ours.model.fingerprint
    assert metadata["target"] == vars(ours.target)
    assert metadata["bytes"] == vars(ours.bytes)
    assert len(found["plan"]) == ours.model.num_layers
    for layer, heads in enumerate(found["plan"]):
        assert [row["head"] for row in heads] == budgets.head_order[layer].tolist()
        for row in heads:
            assert row["policy"] == POLICIES[budgets.policy[layer, row["head"]]]
            for name in ("capacity", "sink", "recent", "k_bits", "v_bits"):
                assert row[name] == getattr(budgets, name)[layer, row["head"]]


def test_a_file_of_version_3(tmp_path: Path) -> None:
    write(make_artifact(tiny_model(CONFIGS["qwen3"]), bits=[(67, 3), (65, 136)]), tmp_path / "a.kvb")
    done = read_with_node(tmp_path / "a.kvb")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["metadata"]["format_version"] == 3
    assert {(row["k_bits"], row["v_bits"]) for heads in found["plan"] for row in heads} == {(67, 3), (65, 136)}


def test_a_file_of_version_4(tmp_path: Path) -> None:
    write(make_artifact(tiny_model(CONFIGS["qwen3-next"])), tmp_path / "a.kvb")
    done = read_with_node(tmp_path / "a.kvb")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metadata"]["format_version"] == 4


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    damaged = bytearray(REFERENCES[0].read_bytes())
    damaged[-1] ^= 1
    file = tmp_path / "damaged.kvb"
    file.write_bytes(damaged)
    done = read_with_node(file)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "the file is damaged\n")


def test_it_is_short_and_needs_no_packages() -> None:
    lines = READER.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert all('from "node:' in line for line in lines if line.startswith("import "))
