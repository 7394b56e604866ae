"""Measuring plans beside the full cache, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kvcompile.artifacts import TargetError, write
from kvcompile.calibration import draw_episodes
from kvcompile.compiler import build
from kvcompile.evaluation import METHODS, contenders, evaluate, evaluation_families, summarise
from kvcompile.models import load


@pytest.fixture(scope="module")
def loaded(model_folder: Path):
    return load(str(model_folder))


@pytest.fixture(scope="module")
def artifact(loaded):
    return build(loaded.model, loaded.tokenizer, mem="30%", context=192, name=loaded.name)


@pytest.fixture(scope="module")
def rows(loaded, artifact):
    families = evaluation_families(loaded.tokenizer, 192, None)
    episodes = draw_episodes(loaded.tokenizer, families, 192, 2, 7, replay=False)
    plans = contenders(artifact, ["optimal", *METHODS][1:], ["40%"], 192)
    plans += contenders(artifact, ["uniform"], ["100%"], 192)[1:]
    return evaluate(loaded.model, episodes, plans)


def test_the_full_cache_diverges_from_nothing_least_of_all_itself(rows) -> None:
    full = [row for row in rows if row.method == "full cache"]
    assert rows[: len(full)] == full
    assert all(row.kl == 0 and row.share == 1 for row in full)
    whole = [row for row in rows if row.budget == "100%"]
    assert whole
    assert max(row.kl for row in whole) < 1e-6


def test_every_method_is_measured_on_the_same_questions(rows) -> None:
    asked = {(row.episode, row.kind) for row in rows}
    for method in ("full cache", "this artifact", *METHODS):
        assert {(row.episode, row.kind) for row in rows if row.method == method} == asked
    assert all(math.isfinite(row.loss) and row.kl >= 0 for row in rows)
    # What KVzip's masks leave comes after 40 %.
    assert all(row.share <= 0.4 or row.method == "kvzip" for row in rows if row.budget == "40%")
    assert max(row.kl for row in rows if row.budget == "40%") > 1e-3


def test_summaries_are_means_over_episodes(rows) -> None:
    found = {(one.method, one.budget): one for one in summarise(rows)}
    assert next(iter(found)) == ("full cache", "")
    mine = [row.loss for row in rows if (row.method, row.budget, row.kind) == ("uniform", "40%", "quote")]
    assert found["uniform", "40%"].kinds["quote"].loss == pytest.approx(sum(mine) / len(mine))
    assert found["uniform", "40%"].kinds["quote"].loss_error >= 0
    shares = [row.share for row in rows if row.method == "kvzip"]
    assert found["kvzip", "40%"].share == pytest.approx(sum(shares) / len(shares))
    assert 0.4 < min(shares) < max(shares)


def test_the_model_is_as_before(loaded, artifact) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    families = evaluation_families(loaded.tokenizer, 64, None)
    evaluate(
        loaded.model,
        draw_episodes(loaded.tokenizer, families, 150, 1, 3, replay=False),
        contenders(artifact, ["optimal"], ["30%"], 150),
    )
    assert all((before[name] == tensor).all() for name, tensor in loaded.model.state_dict().items())


def test_methods_and_budgets_are_checked(artifact) -> None:
    with pytest.raises(TargetError, match="no method 'best'"):
        contenders(artifact, ["best"], ["50%"], 192)
    with pytest.raises(TargetError, match="sinks"):
        contenders(artifact, ["uniform"], ["1%"], 192)


def test_the_command_prints_and_writes(kvcompile, artifact, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    write(artifact, tmp_path / "a.kvb")
    (tmp_path / "text.txt").write_text("The lighthouse keeper counted ships and wrote numbers in a book. " * 60)
    command = (
        "eval", tmp_path / "a.kvb", "--data", tmp_path / "text.txt", "--mem", "30%,60%", "--allocators",
        "optimal,uniform", "--episodes", "1", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png",
    )  # fmt: skip
    status, out, _ = kvcompile(*command)
    assert status == 0
    assert all(name in out for name in ("full cache", "this artifact", "optimal", "uniform"))
    found = json.loads((tmp_path / "a.json").read_text())
    assert {row["method"] for row in found["rows"]} == {"full cache", "this artifact", "optimal", "uniform"}
    assert found["families"] == ["user"]
    assert found["texts"] == f"your text: {tmp_path / 'text.txt'}"
    assert found["texts"] in " ".join(out.replace("\n", "").split())
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "a.json").read_bytes()
    kvcompile(*command)
    assert (tmp_path / "a.json").read_bytes() == first


def test_the_default_texts_are_named(kvcompile, artifact, tmp_path) -> None:
    write(artifact, tmp_path / "a.kvb")
    command = ("eval", tmp_path / "a.kvb", "--mem", "30%", "--allocators", "uniform", "--episodes", "1")
    status, out, _ = kvcompile(*command, "--json", tmp_path / "a.json")
    assert status == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["texts"] == "held-out texts: code, reference, dialogue, essay, paper"
    assert found["texts"] in " ".join(out.split())


def test_too_little_text_is_refused(kvcompile, artifact, tmp_path) -> None:
    write(artifact, tmp_path / "a.kvb")
    (tmp_path / "text.txt").write_text("Short.")
    status, _, err = kvcompile(
        "eval", tmp_path / "a.kvb", "--data", tmp_path / "text.txt", "--json", tmp_path / "a.json"
    )
    assert status == 2
    assert "too short" in err
    assert not (tmp_path / "a.json").exists()
