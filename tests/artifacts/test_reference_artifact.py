"""The reference artifact in the repository stays readable: version 1 files are not to break."""

from __future__ import annotations

from pathlib import Path

from kvcompile.artifacts import read, to_bytes

REFERENCE = Path(__file__).parents[2] / "artifacts" / "reference" / "smollm2-135m-4096-25pct.kvb"


def test_the_reference_artifact_reads_and_writes_back_to_the_same_bytes() -> None:
    artifact = read(REFERENCE)
    assert artifact.model.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert artifact.bytes.resident == artifact.target.bytes == artifact.bytes.full // 4 == 47185920
    assert artifact.budgets.capacity.shape == (30, 3)
    assert artifact.scorer is artifact.quantiser is artifact.rank is None
    assert b'\\"format_version\\":1,' in REFERENCE.read_bytes()
    assert to_bytes(artifact) == REFERENCE.read_bytes()


def test_a_version_2_artifact_with_scorer_and_quantiser() -> None:
    path = REFERENCE.with_name("smollm2-135m-2048-12.5pct.kvb")
    artifact = read(path)
    assert artifact.scorer is not None
    assert artifact.quantiser is not None
    assert artifact.bytes.resident <= artifact.target.bytes == artifact.bytes.full // 8
    assert artifact.bytes.resident >= 0.99 * artifact.target.bytes
    assert b'\\"format_version\\":2,' in path.read_bytes()
    assert to_bytes(artifact) == path.read_bytes()
