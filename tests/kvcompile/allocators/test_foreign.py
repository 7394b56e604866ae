"""Plans from files of other systems, as `--allocator file:PATH` takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvcompile.artifacts import Artifact, TargetError, read
from kvcompile.compiler import resolve

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"
LAYERS, HEADS, QUERY_HEADS = 30, 3, 9


@pytest.fixture(scope="module")
def reference() -> Artifact:
    """A plan with scores and with 4-bit heads, of a real model."""
    return read(REFERENCE)


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
