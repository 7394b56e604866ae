"""An artifact's plan in other systems' files: round trips where nothing is lost, and what is said where some is."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kvcompile.artifacts import Artifact, ExchangeError, read
from kvcompile.cli import cli
from kvcompile.compiler import resolve
from kvcompile.export import EXPORTS, Export, Exporter, export, register, write
from kvcompile.export.values import static_shares
from kvcompile.formats import FORMATS, Format, Importance
from kvcompile.formats import register as register_format

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"
FIELDS = ("policy", "capacity", "sink", "recent", "k_bits", "v_bits")
LAYERS, HEADS = 30, 3


@pytest.fixture(scope="module")
def reference() -> Artifact:
    """A plan with scores and with 4-bit heads, of a real model."""
    return read(REFERENCE)


def same(one: Artifact, two: Artifact) -> bool:
    return all(np.array_equal(getattr(one.budgets, name), getattr(two.budgets, name)) for name in FIELDS)


@pytest.fixture(scope="module")
def exported(reference: Artifact) -> dict[str, Export]:
    """The reference in every format; LU-KV's 99 levels take a while."""
    return {name: export(reference, name) for name in EXPORTS}


def put(made: Export, folder: Path) -> Path:
    out = folder / ("pattern" if made.format.folder else next(iter(made.files)))
    write(made, out)
    return out


def test_full_and_streaming_heads_come_back(reference: Artifact, tmp_path: Path) -> None:
    plan = resolve(reference, mem="25%", allocator="duo")
    made = export(plan, "duoattention")
    assert made.lost is None
    assert made.loss == pytest.approx(plan.predicted_loss)
    again = resolve(plan, mem="25%", allocator=f"file:{put(made, tmp_path)}")
    assert same(again, plan)


def test_budgets_come_back_from_scores_but_for_rounding(reference: Artifact, tmp_path: Path) -> None:
    plan = resolve(reference, mem="25%", allocator="surfacelogic", policy="scored")
    out = put(export(plan, "headkv"), tmp_path)
    again = resolve(plan, mem="25%", policy="scored", allocator=f"file:{out}")
    # Scores are shares of all tokens, so that what is divided at the end moves large heads by a little.
    assert (abs(again.budgets.capacity - plan.budgets.capacity) <= 1 + plan.budgets.capacity // 200).all()


def test_windows_that_are_equal_in_a_layer_lose_nothing(reference: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "windows.json"
    given = {"max_attention_window": [64 + 16 * layer for layer in range(LAYERS)], "sink_token_length": 2}
    file.write_text(json.dumps(given))
    plan = resolve(reference, mem="50%", allocator=f"file:{file}", kv_dtype="bf16")
    assert (plan.budgets.capacity == np.array(given["max_attention_window"])[:, None]).all()
    assert (plan.budgets.sink == 2).all()
    made = export(plan, "windows")
    assert made.lost is None
    assert json.loads(made.files["windows.json"]) == given
    assert made.loss == pytest.approx(plan.predicted_loss)


def test_curves_of_lukv_are_those_of_every_target(
    reference: Artifact, exported: dict[str, Export], tmp_path: Path
) -> None:
    out = put(exported["lukv"], tmp_path)
    pruned = np.load(out)
    assert pruned.shape == (99, LAYERS, HEADS)
    assert pruned.dtype == np.float32
    # In tokens every level prunes what it says, but for scores and for the fewest tokens of a head.
    for level in (20, 50, 75):
        assert pruned[level - 1].mean() == pytest.approx(level / 100, abs=0.012)
    again = resolve(reference, mem="25%", policy="scored", allocator=f"file:{out}")
    level = again.budgets.capacity / 2048
    assert min(abs(1 - kept - level).max() for kept in pruned) < 1e-3, "the plan is one of the levels"
    # Levels are 1 % of the full cache apart.
    assert 0.95 * again.target.bytes < again.bytes.resident <= again.target.bytes


@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_lost_is_said_and_its_loss_predicted(
    name: str, reference: Artifact, exported: dict[str, Export]
) -> None:
    made = exported[name]
    assert made.lost == EXPORTS[name].lost
    assert made.loss > 2 * reference.predicted_loss, "four bits and scores are not in the file"
    assert made.plan.capacity.shape == (LAYERS, HEADS)


def test_clusters_hold_every_head_once(reference: Artifact, exported: dict[str, Export], tmp_path: Path) -> None:
    with np.load(put(exported["tangram"], tmp_path)) as file:
        members, size = file["cluster_members"], int(file["page_group_size"])
        assert members.shape == (LAYERS * HEADS // size, size, 2)
        for cluster, heads in enumerate(members):
            for column, (layer, head) in enumerate(heads):
                assert (file["cluster_of"][layer, head], file["column_of"][layer, head]) == (cluster, column)
            # Heads of one layer are neighbours.
            assert (np.diff(heads[:, 0]) >= 0).all()
        score = file["rank_score"]
        assert np.array_equal(score, (reference.budgets.capacity / 2048).astype(np.float32))
        smallest = [score[tuple(heads.T)].min() for heads in members]
        largest = [score[tuple(heads.T)].max() for heads in members]
        assert all(a >= b for a, b in zip(smallest, largest[1:], strict=False))


def test_the_command_line_exports_and_takes_back(tmp_path: Path) -> None:
    run = CliRunner()
    out, again = tmp_path / "heads.json", tmp_path / "again.kvb"
    done = run.invoke(cli, ["export", str(REFERENCE), "--to", "headkv", "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["exported_loss"] > report["predicted_loss"]
    built = ["build", "--from", str(REFERENCE), "--mem", "25%", "--allocator", f"file:{out}", "-o", str(again)]
    done = run.invoke(cli, built)
    assert done.exit_code == 0, done.output
    assert read(again).solver["allocator"] == f"file:{out}"
    # A head that kept more tokens does not keep fewer.
    order = np.argsort(read(REFERENCE).budgets.capacity, axis=None, kind="stable")
    assert (np.diff(read(again).budgets.capacity.ravel()[order]) >= -1).all()


def test_an_unknown_format_and_a_place_that_cannot_be_written_are_refused(
    reference: Artifact, exported: dict[str, Export], tmp_path: Path
) -> None:
    with pytest.raises(ExchangeError, match="there is no format 'gguf': expected one of duoattention, lukv"):
        export(reference, "gguf")
    with pytest.raises(ExchangeError, match="cannot be written"):
        write(exported["windows"], tmp_path / "nowhere" / "windows.json")
    assert not list(tmp_path.iterdir())


def test_a_plan_too_small_for_a_format_is_refused(reference: Artifact) -> None:
    """Four bits a head, of which the other system would need sixteen."""
    tiny = resolve(reference, mem="80000")
    for name in ("duoattention", "headkv", "tangram", "windows"):
        with pytest.raises(ExchangeError, match=f"^as {name}, the plan of {reference.model.name} takes more than"):
            export(tiny, name)


def test_layers_with_a_window_are_left_out_of_clusters(reference: Artifact) -> None:
    windows = tuple(64 if layer in (0, 7) else 0 for layer in range(LAYERS))
    sliding = dataclasses.replace(reference, model=dataclasses.replace(reference.model, windows=windows))
    files = FORMATS["tangram"].write(static_shares(sliding))
    with np.load(io.BytesIO(files["cluster_map.npz"])) as file:
        meta = json.loads(bytes(file["meta"]))
        assert meta["static_layer_ids"] == [layer for layer in range(LAYERS) if layer not in (0, 7)]
        assert meta["source_model"] == reference.model.name
        score = reference.budgets.capacity[meta["static_layer_ids"]] / 2048
        assert np.array_equal(file["rank_score"], score.astype(np.float32))


def read_toy(path: Path) -> Importance:
    return Importance(str(path), np.loadtxt(path, ndmin=2))


def write_toy(value: Importance) -> dict[str, bytes]:
    text = io.BytesIO()
    np.savetxt(text, value.weights)
    return {"heads.toy": text.getvalue()}


TOY = Exporter(static_shares, "all but shares", "scored")


@pytest.fixture
def toy() -> Iterator[Exporter]:
    register_format("toy", Format(read_toy, write_toy, lambda path: path.suffix == ".toy", looks=".toy"))
    register("toy", TOY)
    yield TOY
    del EXPORTS["toy"], FORMATS["toy"]


def test_an_exporter_from_outside_writes_and_says_what_is_lost(toy: Exporter, tmp_path: Path) -> None:
    out = tmp_path / "heads.toy"
    done = CliRunner().invoke(cli, ["export", str(REFERENCE), "--to", "toy", "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["lost"] == "all but shares"
    assert report["exported_loss"] > report["predicted_loss"]
    plan = resolve(read(REFERENCE), mem="12.5%", allocator=f"file:{out}")
    assert np.corrcoef(plan.budgets.capacity.ravel(), read(REFERENCE).budgets.capacity.ravel())[0, 1] > 0.99


def test_an_exporter_without_a_format_or_with_a_taken_name_is_refused(toy: Exporter) -> None:
    register("toy", TOY)  # the same one
    with pytest.raises(ValueError, match="there is no format 'other'"):
        register("other", TOY)
    with pytest.raises(ValueError, match="'windows' already"):
        register("windows", TOY)
