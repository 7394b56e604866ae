"""Files of other systems: round trips where nothing is lost, what is said where something is, and refusals."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kvcompile.artifacts import Artifact, ExchangeError, TargetError, read
from kvcompile.cli import cli
from kvcompile.compiler import resolve
from kvcompile.formats import FORMATS, Export, export, write

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"
FIELDS = ("policy", "capacity", "sink", "recent", "k_bits", "v_bits")
LAYERS, HEADS, QUERY_HEADS = 30, 3, 9


@pytest.fixture(scope="module")
def reference() -> Artifact:
    """A plan with scores and with 4-bit heads, of a real model."""
    return read(REFERENCE)


def same(one: Artifact, two: Artifact) -> bool:
    return all(np.array_equal(getattr(one.budgets, name), getattr(two.budgets, name)) for name in FIELDS)


@pytest.fixture(scope="module")
def exported(reference: Artifact) -> dict[str, Export]:
    """The reference in every format; LU-KV's 99 levels take a while."""
    return {name: export(reference, name) for name in FORMATS}


def put(made: Export, name: str, folder: Path) -> Path:
    out = folder / ("pattern" if FORMATS[name].folder else next(iter(made.files)))
    write(made.files, FORMATS[name], out)
    return out


def test_full_and_streaming_heads_come_back(reference: Artifact, tmp_path: Path) -> None:
    plan = resolve(reference, mem="25%", allocator="duo")
    made = export(plan, "duoattention")
    assert made.lost is None
    assert made.loss == pytest.approx(plan.predicted_loss)
    again = resolve(plan, mem="25%", allocator=f"file:{put(made, 'duoattention', tmp_path)}")
    assert same(again, plan)


def test_budgets_come_back_from_scores_but_for_rounding(reference: Artifact, tmp_path: Path) -> None:
    plan = resolve(reference, mem="25%", allocator="surfacelogic", policy="scored")
    out = put(export(plan, "headkv"), "headkv", tmp_path)
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
    out = put(exported["lukv"], "lukv", tmp_path)
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


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_lost_is_said_and_its_loss_predicted(
    name: str, reference: Artifact, exported: dict[str, Export]
) -> None:
    made = exported[name]
    assert made.lost == FORMATS[name].lost
    assert made.loss > 2 * reference.predicted_loss, "four bits and scores are not in the file"
    assert made.plan.capacity.shape == (LAYERS, HEADS)


def test_clusters_hold_every_head_once(reference: Artifact, exported: dict[str, Export], tmp_path: Path) -> None:
    with np.load(put(exported["tangram"], "tangram", tmp_path)) as file:
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


def test_a_retention_profile_of_tangram_is_a_plan(reference: Artifact, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 1, (LAYERS, HEADS))
    file = tmp_path / "profile.npz"
    np.savez(file, ratio_per_head=np.stack([0.2 * base, 0.4 * base, 0.9 * base]), base_ratios=[0.2, 0.4, 0.9])
    plan = resolve(reference, mem="33%", allocator=f"file:{file}", policy="recent")
    assert np.array_equal(plan.budgets.capacity, np.rint(0.4 * base * 2048))


def test_scores_of_query_heads_are_averaged_over_a_group(reference: Artifact, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(1, 2, (LAYERS, QUERY_HEADS, 5))
    file = tmp_path / "heads.json"
    file.write_text(
        json.dumps({f"{layer}-{h}": scores[layer, h].tolist() for layer, h in np.ndindex(scores.shape[:2])})
    )
    plan = resolve(reference, mem="25%", allocator=f"file:{file}", policy="recent")
    weights = scores.mean(-1).reshape(LAYERS, HEADS, -1).mean(-1)
    expected = weights / weights.sum() * plan.budgets.capacity.sum()
    assert abs(plan.budgets.capacity - expected).max() <= 1


def test_gates_above_zero_are_full_as_far_as_the_target_goes(reference: Artifact, tmp_path: Path) -> None:
    gates = np.zeros((LAYERS, HEADS))
    gates[3], gates[7, 1] = [0.2, 1.4, 0.9], 0.5
    np.savetxt(tmp_path / "full_attention_heads.tsv", gates, delimiter="\t")
    (tmp_path / "config.json").write_text(json.dumps({"sink_size": 16, "recent_size": 64, "lr": 0.02}))
    plan = resolve(reference, mem="50%", allocator=f"file:{tmp_path}")
    full = plan.budgets.capacity == 2048
    assert np.array_equal(full, gates > 0)
    assert (plan.budgets.sink[~full] == 16).all()
    assert (plan.budgets.recent[~full] == 64).all()
    few = resolve(reference, mem="6%", allocator=f"file:{tmp_path / 'full_attention_heads.tsv'}")
    kept = np.argwhere(few.budgets.capacity == 2048).tolist()
    assert 0 < len(kept) < 4
    assert kept[0] == [3, 1]


def npy(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})
    return file.getvalue()


HEADS_OF = {f"{layer}-{head}": [0.5] for layer, head in np.ndindex(LAYERS, QUERY_HEADS)}
MALFORMED = {
    "empty.npy": (b"", "is not such a file"),
    "text.npy": (b"no array", "is not such a file"),
    "pickle.npy": (npy(np.array([{}], dtype=object)), "is not such a file"),
    "levels.npy": (npy(np.zeros((98, LAYERS, HEADS))), "expected \\[99, layers, heads\\]"),
    "shares.npy": (npy(np.full((99, LAYERS, HEADS), 1.5)), "shares from 0 to 1"),
    "nan.npy": (npy(np.full((99, LAYERS, HEADS), math.nan)), "finite numbers"),
    "other.npy": (npy(np.full((99, 32, 8), 0.5)), "is for 32 x 8 layers and heads: expected 30 x 3"),
    "cut.npz": (npz(rank_score=np.ones((LAYERS, HEADS)))[:-40], "is not such a file"),
    "none.npz": (npz(other=np.ones(3)), "has no usable 'rank_score'"),
    "map.npz": (
        npz(rank_score=np.ones((LAYERS, HEADS)), cluster_of=np.zeros((LAYERS, HEADS), int), page_group_size=4),
        "is no cluster map",
    ),
    "text.json": (b"{", "is not such a file"),
    "list.json": (b"[1]", "expected a JSON object"),
    "hole.json": (json.dumps({k: v for k, v in HEADS_OF.items() if k != "3-2"}).encode(), "has 269 heads"),
    "name.json": (json.dumps(HEADS_OF | {"x": [1]}).encode(), "has 271 heads"),
    "negative.json": (json.dumps(HEADS_OF | {"3-2": [-1]}).encode(), "no usable '3-2'"),
    "words.json": (json.dumps(HEADS_OF | {"3-2": ["much"]}).encode(), "no usable '3-2'"),
    "layers.json": (json.dumps({"max_attention_window": [64] * 32}).encode(), "is for 32 layers: expected 30"),
    "zero.json": (json.dumps({"max_attention_window": [0] * 30}).encode(), "at least 1"),
    "nested.json": (json.dumps({"max_attention_window": [[64] * 30]}).encode(), "expected a list of tokens"),
    "sinks.json": (json.dumps({"max_attention_window": [64] * 30, "sink_token_length": [4, 4]}).encode(), "one whole"),
    "twice.json": (json.dumps({k: v for k, v in HEADS_OF.items() if k != "3-2"} | {"03-1": [1]}).encode(), "270 heads"),
    "sizes.npz": (
        npz(rank_score=np.ones((2, 2)), cluster_of=np.zeros((2, 2), int), page_group_size=[4, 4]),
        "one whole number",
    ),
    "half.json": (json.dumps({"max_attention_window": [1.5] * 30}).encode(), "whole numbers"),
    "table.tsv": (b"0.1\t0.2\n0.3\n", "is not such a file"),
    "alone.tsv": (b"0.1\t0.2\t0.3\n" * 30, "config.json cannot be read"),
    "budget.txt": (b"64", "is of no known kind"),
    "missing.npy": (None, "cannot be read"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    data, message = MALFORMED[name]
    file, out = tmp_path / name, tmp_path / "out.kvb"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(ExchangeError, match=message):
        resolve(read(REFERENCE), mem="25%", allocator=f"file:{file}", out=out)
    assert not out.exists()


def test_windows_above_the_target_are_refused(reference: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "windows.json"
    file.write_text(json.dumps({"max_attention_window": [1024] * LAYERS}))
    with pytest.raises(TargetError, match="ask for as much memory"):
        resolve(reference, mem="25%", allocator=f"file:{file}")


def test_a_policy_that_a_file_cannot_have_is_refused(reference: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "windows.json"
    file.write_text(json.dumps({"max_attention_window": [64] * LAYERS}))
    with pytest.raises(TargetError, match="cannot work with the policy 'h2o'"):
        resolve(reference, mem="25%", allocator=f"file:{file}", policy="h2o")


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


def test_an_unknown_format_and_a_place_that_cannot_be_written_are_refused(reference: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match="there is no format 'gguf': expected one of duoattention, lukv"):
        export(reference, "gguf")
    with pytest.raises(ExchangeError, match="cannot be written"):
        write({"windows.json": b"{}"}, FORMATS["windows"], tmp_path / "nowhere" / "windows.json")
    assert not list(tmp_path.iterdir())
