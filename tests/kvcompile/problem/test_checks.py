"""What is refused before anything is profiled or solved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvcompile.artifacts import Artifact, ArtifactError, TargetError, read
from kvcompile.assemble import stored_parts
from kvcompile.compiler import resolve
from kvcompile.problem import Options, check_out, check_positions, parse_memory, resolve_target
from kvcompile.stages import KeyMoments, Moment, Parts, Rotary

REFERENCE = Path(__file__).parents[3] / "artifacts" / "reference" / "smollm2-135m-2048-12.5pct.kvb"
LONG = 8192


@pytest.fixture(scope="module")
def reference() -> Artifact:
    """Of 2,048 tokens, with 4-bit keys, from before profiles had moments of keys."""
    return read(REFERENCE)


@pytest.fixture(scope="module")
def unquantised(reference: Artifact) -> Artifact:
    """Of more tokens than the quantiser was made for, which nothing in the plan needs."""
    return resolve(reference, mem="25%", context=LONG, allocator="uniform", kv_dtype="bf16")


def rotary_of(parts: Parts, context: int) -> Parts:
    """The parts with moments of keys, whose frequencies are those of sequences of `context` tokens."""
    moment = Moment(np.zeros((30, 3, 64), np.float32), np.zeros((30, 3, 2080), np.float16))
    rotary = Rotary(np.zeros((30, 64), np.float32), np.arange(64, dtype=np.int32), context)
    return replace(parts, profile=replace(parts.profile, keys=KeyMoments(moment, moment, moment, rotary)))


def test_keys_are_not_quantised_for_positions_that_an_old_file_does_not_know(
    reference: Artifact, unquantised: Artifact
) -> None:
    for artifact in (reference, unquantised):
        with pytest.raises(TargetError, match=f"the first 2048 positions alone, which {LONG} tokens outgrow"):
            resolve(artifact, mem="12%", context=LONG)


def test_a_plan_that_has_such_keys_already_is_solved_anew(reference: Artifact) -> None:
    long = replace(reference, target=replace(reference.target, context=LONG))
    check_positions(long, stored_parts(long), long.target, Options())


def test_a_codec_without_a_transform_takes_any_positions(reference: Artifact) -> None:
    plan = resolve(reference, mem="60%", context=LONG, allocator="uniform", kv_dtype="fp8")
    assert plan.target.context == LONG
    with pytest.raises(TargetError, match="outgrow"):  # it has quantised keys, but none that were transformed
        resolve(plan, mem="12%")


def test_the_context_of_a_file_does_not_stand_for_that_of_its_rotary_embedding(
    reference: Artifact, unquantised: Artifact
) -> None:
    parts = rotary_of(stored_parts(unquantised), reference.target.context)
    for options in (Options(), Options(kv_dtype="int4")):
        with pytest.raises(TargetError, match=f"holds that of 2048 tokens, not of {LONG}"):
            check_positions(unquantised, parts, unquantised.target, options)
    for options in (Options(kv_dtype="bf16"), Options(kv_dtype="fp8"), Options(allocator="uniform")):
        check_positions(unquantised, parts, unquantised.target, options)
    for context in (0, LONG):
        check_positions(unquantised, rotary_of(parts, context), unquantised.target, Options())


@pytest.mark.parametrize(
    ("mem", "context", "batch", "words"),
    [
        ("25%", 3_000_000_000, 1, "at most 2147483647 tokens"),
        ("25%", 64, 2_000_000, "a batch of 1048576"),
        ("99999999999GB", 64, 1, "at most 9223372036854775807 bytes"),
        ("1GB", 2**31 - 1, 2**20, "at most 9223372036854775807 bytes"),
    ],
)
def test_what_no_artifact_can_say_is_refused(
    reference: Artifact, mem: str, context: int, batch: int, words: str
) -> None:
    with pytest.raises(TargetError, match=words):
        resolve_target(reference.model, parse_memory(mem), context, batch, "auto")
    with pytest.raises(TargetError, match=words):
        resolve(reference, mem=mem, context=context, batch=batch)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="name another file"):
        check_out(tmp_path / ("a" * 300))
    check_out(tmp_path / "a.kvb")
