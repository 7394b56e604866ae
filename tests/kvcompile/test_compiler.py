"""From a model to an artifact and back, on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import kvcompile
from kvcompile.allocators import ALLOCATORS
from kvcompile.artifacts import POLICIES, TargetError, full_bytes, read, to_bytes
from kvcompile.compiler import Options, build, build_many, resolve
from kvcompile.models import load
from kvcompile.runtime import attach


@pytest.fixture(scope="module")
def loaded(model_folder: Path):
    return load(str(model_folder))


def options(**changes):
    return {"mem": "25%", "context": 192, "batch": 1, **changes}


def test_build_is_the_package_s_front_door() -> None:
    assert kvcompile.build is build


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "policy"), [(n, p) for n, a in ALLOCATORS.items() for p in a.policies])
def test_promised_planned_and_allocated_bytes_agree(loaded, tmp_path, name, policy, batch) -> None:
    out = tmp_path / "a.kvb"
    # Of few choices of few bits the last bytes cannot always be used: one codec for all then.
    own = "fp32" if name == "optimal" and batch == 1 else "auto"
    given = options(batch=batch, allocator=name, policy=policy, out=out, mem="37%", kv_dtype=own)
    artifact = build(loaded.model, loaded.tokenizer, **given)
    stored = read(out)
    assert stored.bytes == artifact.bytes
    full = batch * full_bytes(artifact.model, 192, "float32")
    assert stored.target.bytes == full * 37 // 100
    assert stored.bytes.resident <= stored.target.bytes
    if own == "fp32":
        assert stored.bytes.resident >= 0.99 * stored.target.bytes
    with attach(loaded.model, out) as kv:
        cache = kv.new_cache(batch)
        ids = torch.randint(0, 256, (batch, 150))
        loaded.model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert cache.nbytes == stored.bytes.resident


def test_the_same_inputs_give_the_same_bytes(loaded, tmp_path, monkeypatch) -> None:
    files = []
    for run in ("a", "b"):
        monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / run))  # both profile from the start
        build(loaded.model, loaded.tokenizer, **options(out=tmp_path / f"{run}.kvb"))
        files.append((tmp_path / f"{run}.kvb").read_bytes())
    assert files[0] == files[1]
    build(loaded.model, loaded.tokenizer, **options(out=tmp_path / "c.kvb", seed=1))
    assert (tmp_path / "c.kvb").read_bytes() != files[0]


def test_an_interrupted_build_resumes_to_the_same_file(loaded, tmp_path, monkeypatch) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done > total * 0.6:
            raise KeyboardInterrupt

    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "a.kvb"
    with pytest.raises(KeyboardInterrupt):
        build(loaded.model, loaded.tokenizer, **options(out=out, report=interrupt))
    assert not list(tmp_path.glob("*.kvb*"))
    first: list[int] = []
    build(loaded.model, loaded.tokenizer, **options(out=out, report=lambda stage, done, total: first.append(done)))
    everything: list[int] = []
    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "fresh"))
    build(
        loaded.model,
        loaded.tokenizer,
        **options(out=tmp_path / "b.kvb", report=lambda stage, done, total: everything.append(done)),
    )
    assert len(first) < 0.6 * len(everything), "the second build did the work again"
    assert out.read_bytes() == (tmp_path / "b.kvb").read_bytes()


def test_solving_anew_equals_building_anew(loaded, tmp_path) -> None:
    build(loaded.model, loaded.tokenizer, **options(out=tmp_path / "quarter.kvb"))
    build(loaded.model, loaded.tokenizer, **options(out=tmp_path / "half.kvb", mem="50%", batch=2))
    resolve(read(tmp_path / "quarter.kvb"), mem="50%", batch=2, out=tmp_path / "again.kvb")
    assert (tmp_path / "again.kvb").read_bytes() == (tmp_path / "half.kvb").read_bytes()


def test_a_full_target_keeps_everything(loaded) -> None:
    artifact = build(loaded.model, loaded.tokenizer, **options(mem="100%"))
    assert (artifact.budgets.policy == POLICIES.index("full")).all()
    assert artifact.bytes.resident == artifact.bytes.full == artifact.target.bytes
    assert artifact.predicted_loss == 0


def test_the_artifact_says_where_it_comes_from(loaded, model_folder) -> None:
    artifact = build(loaded.model, loaded.tokenizer, **options(name=str(model_folder)))
    assert artifact.model.name == str(model_folder)
    assert artifact.solver["allocator"] == "optimal"
    assert artifact.solver["bound"] <= artifact.solver["objective"] * (1 + 1e-6) + 1e-12
    assert artifact.calibration["seed"] == 0
    assert len(artifact.calibration["sha256"]) == 64
    assert set(artifact.versions) >= {"kvcompile", "torch", "transformers", "scipy"}
    assert artifact.calibration["sources"] == ["code", "reference", "dialogue", "essay", "paper"]
    assert len(artifact.calibration["checked_plans"]) == 6
    assert artifact.calibration["values"] == "fitted"
    curves = artifact.profile["loss"]
    assert curves.shape == (6, 3, 2, 4, len(artifact.profile["tokens"]))
    assert (curves >= 0).all()
    assert (curves[..., -1] == 0).all()
    assert curves[..., 0].max() > 0


def test_a_cache_of_another_dtype(loaded) -> None:
    artifact = build(loaded.model, loaded.tokenizer, **options(kv_dtype="bf16"))
    assert (artifact.budgets.k_bits == 16).all()
    assert artifact.target.dtype == "bfloat16"
    assert artifact.bytes.full == full_bytes(artifact.model, 192, "float32") // 2
    with attach(loaded.model, artifact) as kv:
        cache = kv.new_cache()
        loaded.model.generate(torch.randint(0, 256, (1, 100)), past_key_values=cache, max_new_tokens=5)
        assert {t.dtype for t in cache.tensors()} <= {torch.bfloat16, torch.float16}  # scores are of half precision
        assert cache.nbytes == artifact.bytes.resident


LEAST = 3 * 2 * (5 * ((4 + 2) + (2 + 2)) + 2 * 8 * 4)
"""Bytes of three layers of two heads at five slots each: a key of 8 codes of 4 bits and a scale, a value of 8 codes of
2 bits and a scale, and exact copies of the first token's."""


def test_impossible_targets_are_refused_before_the_profile(loaded, monkeypatch) -> None:
    monkeypatch.setattr("kvcompile.profile.cached.measure", lambda *a, **k: pytest.fail("profiled in vain"))
    with pytest.raises(TargetError, match=f"below the {LEAST} bytes"):
        build(loaded.model, loaded.tokenizer, **options(mem=str(LEAST - 1)))
    with pytest.raises(TargetError, match="no cache type 'int5'"):
        build(loaded.model, loaded.tokenizer, **options(kv_dtype="int5"))
    with pytest.raises(TargetError, match="at least 1"):
        build(loaded.model, loaded.tokenizer, **options(batch=0))
    with pytest.raises(TargetError, match="2 KV heads do not divide among 3 ranks"):
        build(loaded.model, loaded.tokenizer, **options(ranks=3))
    with pytest.raises(TargetError, match="no allocator"):
        build(loaded.model, loaded.tokenizer, **options(allocator="best"))


def test_the_least_target_is_met(loaded) -> None:
    artifact = build(loaded.model, loaded.tokenizer, **options(mem=str(LEAST)))
    assert (artifact.budgets.capacity == 5).all()
    assert (artifact.budgets.v_bits == 2).all()
    assert math.isfinite(artifact.predicted_loss)


def test_one_profile_serves_several_targets(loaded, tmp_path) -> None:
    wanted = {"20%": tmp_path / "a.kvb", "50%": tmp_path / "b.kvb"}
    stages: set[int] = set()
    built = build_many(
        loaded.model,
        loaded.tokenizer,
        wanted,
        Options(context=192),
        report=lambda stage, done, total: stages.add(total) if stage == "profiling" else None,
    )
    assert len(stages) <= 1
    for mem, artifact in zip(wanted, built, strict=True):
        alone = build(loaded.model, loaded.tokenizer, **options(mem=mem))
        assert to_bytes(alone) == wanted[mem].read_bytes() == to_bytes(artifact)


def test_classes_and_ranks(loaded) -> None:
    artifact = build(loaded.model, loaded.tokenizer, **options(classes=1, ranks=2))
    budgets = artifact.budgets
    for name in ("policy", "capacity", "sink", "recent", "k_bits", "v_bits"):
        table = getattr(budgets, name)
        assert (table == table[:, :1]).all()
    assert sorted(artifact.rank[0].tolist()) == [0, 1]
    order = np.take_along_axis(artifact.rank, budgets.head_order, axis=1)
    assert (np.diff(order, axis=1) >= 0).all(), "the heads of a rank lie side by side"
    assert artifact.solver["placement"]["ranks"] == 2


def test_all_in_eight_bits(loaded) -> None:
    artifact = build(loaded.model, loaded.tokenizer, **options(kv_dtype="int8", allocator="uniform", mem="50%"))
    assert (artifact.budgets.k_bits == 8).all()
    assert (artifact.budgets.v_bits == 8).all()
    assert artifact.target.dtype == "float32"


def test_refining_never_keeps_what_measures_worse(loaded) -> None:
    artifact = build(loaded.model, loaded.tokenizer, **options(refine=3))
    tried = artifact.solver["refined"]
    assert tried[0]["doubt"] == "none"
    assert len(tried) == 4
    assert artifact.solver["measured_kl"] == min(entry["measured"] for entry in tried)
    assert artifact.bytes.resident <= artifact.target.bytes


def test_files_of_version_1_are_solved_anew() -> None:
    old = read(Path(__file__).parents[2] / "artifacts" / "reference" / "smollm2-135m-4096-25pct.kvb")
    artifact = resolve(old, mem="40%")
    assert artifact.bytes.resident >= 0.99 * artifact.target.bytes
    assert (artifact.budgets.k_bits == 32).all()
    assert artifact.predicted_loss < old.predicted_loss
