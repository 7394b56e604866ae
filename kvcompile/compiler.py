"""The compiler from end to end: calibrate, profile, solve, write."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvcompile.allocators import allocate, default_policy, least_bytes
from kvcompile.artifacts import (
    Artifact,
    ArtifactError,
    ModelIdentity,
    Target,
    TargetError,
    full_bytes,
    identify,
    write,
)
from kvcompile.assemble import assemble, pose, stored_profile
from kvcompile.cache_dir import cache_dir
from kvcompile.calibration import Calibration, calibrate
from kvcompile.memory import Memory, parse_memory
from kvcompile.problem import DEFAULT_SINK, Plan, Problem, Profile
from kvcompile.profile import measure, perplexity, profile_key

KV_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Names of `--kv-dtype` beside `auto`, which is the model's own."""

PROFILE_TOKENS = 4096
"""Longest calibration window; a longer context is profiled at this length and its curves are stretched."""
WINDOWS = 6
PROBES = 8
SEARCH_TOKENS = 2048
"""Longest window on which an allocator's parameter search measures perplexity; all of that length are used."""

Report = Callable[[str, int, int], None]
"""Called with the stage's name, the work done and the work in all."""


def build(
    model: Any,
    tokenizer: Any,
    *,
    mem: str,
    context: int | None = None,
    batch: int = 1,
    out: str | os.PathLike[str] | None = None,
    allocator: str = "optimal",
    policy: str | None = None,
    kv_dtype: str = "auto",
    calib: str | os.PathLike[str] | None = None,
    seed: int = 0,
    name: str | None = None,
    report: Report | None = None,
) -> Artifact:
    """Compile the KV cache of a transformers causal LM to a memory target and, with `out`, write the artifact.

    Args:
        mem: bytes (`8GB`, `512MiB`), or a share (`25%`) of the full cache for `batch` sequences of `context` tokens.
        context: tokens a sequence; default: the most that the model was made for.
        allocator: a name from `kvcompile.allocators.ALLOCATORS`.
        policy: `recent`, `window` (recent without sinks), `h2o` or `snapkv`; default: the allocator's own.
        kv_dtype: `auto` (the model's), `bf16`, `fp16` or `fp32`.
        calib: a file or folder with text to calibrate on instead of what the Python installation carries.
        name: under which `kvcompile run` finds the model again; default: the model's own.

    An interrupted profile resumes where it stopped, and a finished one serves the next target too (`KVCOMPILE_CACHE`).

    Raises:
        KvcompileError: an impossible target, an unsupported model, too little text, or an `out` that cannot be written.
    """
    memory = parse_memory(mem)
    check_out(out)
    identity = identify(model, name or str(model.config.name_or_path or model.config.model_type))
    config = model.config.get_text_config()
    context = context or int(config.max_position_embeddings)
    target = resolve_target(identity, memory, context, batch, kv_dtype)
    token_policy, sink = resolve_policy(allocator, policy)
    check_target(identity, target, token_policy, sink, memory)

    path = None if calib is None else Path(calib)
    length = min(context, PROFILE_TOKENS)
    calibration = calibrate(tokenizer, length=length, count=WINDOWS, seed=seed, path=path, probes=PROBES)
    windows = [window.ids for window in calibration.windows]
    key = profile_key(
        fingerprint=identity.fingerprint,
        calibration=calibration.sha256,
        dtype=identity.dtype,
        seed=seed,
        sink=DEFAULT_SINK,
    )
    measured = measure(
        model,
        windows,
        calibration.probes,
        seed=seed,
        progress=report and (lambda done, total: report("profiling", done, total)),
        store=cache_dir("profiles", key),
    )
    problem = pose(identity, measured.profile, target, token_policy, sink)
    problem = dataclasses.replace(problem, perplexity=_perplexity(model, calibration, problem, report))
    described = {**calibration.describe(), "probes_answered": measured.answered}
    return finish(identity, problem, target, allocator, described, out)


def resolve(
    artifact: Artifact,
    *,
    mem: str,
    context: int | None = None,
    batch: int | None = None,
    out: str | os.PathLike[str] | None = None,
    allocator: str = "optimal",
    policy: str | None = None,
    kv_dtype: str = "auto",
) -> Artifact:
    """Solve another target from the curves inside an artifact, without the model. Arguments as for `build`, with the
    artifact's own context and batch as defaults.

    Raises:
        KvcompileError: an impossible target, an artifact without curves, or an `out` that cannot be written.
    """
    memory = parse_memory(mem)
    check_out(out)
    identity, profile = artifact.model, stored_profile(artifact)
    dtype = artifact.target.dtype if kv_dtype == "auto" else kv_dtype
    target = resolve_target(identity, memory, context or artifact.target.context, batch or artifact.target.batch, dtype)
    token_policy, sink = resolve_policy(allocator, policy)
    check_target(identity, target, token_policy, sink, memory)
    problem = pose(identity, profile, target, token_policy, sink)
    return finish(identity, problem, target, allocator, dict(artifact.calibration), out)


def finish(
    identity: ModelIdentity,
    problem: Problem,
    target: Target,
    allocator: str,
    calibration: dict[str, Any],
    out: str | os.PathLike[str] | None,
) -> Artifact:
    """Solve, assemble and write."""
    plan: Plan = allocate(allocator, problem)
    solver = {"allocator": allocator, "policy": problem.policy, "sink": problem.sink}
    artifact = assemble(identity, problem.profile, target, plan, solver=solver, calibration=calibration)
    if out is not None:
        write(artifact, Path(out))
    return artifact


def resolve_target(identity: ModelIdentity, memory: Memory, context: int, batch: int, kv_dtype: str) -> Target:
    """The target in bytes, and what it is for."""
    if context < 1 or batch < 1:
        raise TargetError(f"a context of {context} tokens and a batch of {batch} were given: expected at least 1")
    dtype = identity.dtype if kv_dtype == "auto" else KV_DTYPES.get(kv_dtype, kv_dtype)
    if dtype not in KV_DTYPES.values():
        raise TargetError(f"there is no cache type {kv_dtype!r}: expected one of auto, {', '.join(KV_DTYPES)}")
    full = batch * full_bytes(identity, context, dtype)
    return Target(bytes=memory.bytes(full), context=context, batch=batch, dtype=dtype)


def resolve_policy(allocator: str, policy: str | None) -> tuple[str, int]:
    """The token policy and its sinks; `window` is `recent` without sinks."""
    default = default_policy(allocator)
    return ("recent", 0) if policy == "window" else (policy or default, DEFAULT_SINK)


def check_target(identity: ModelIdentity, target: Target, policy: str, sink: int, memory: Memory) -> None:
    """Refuse a target that nothing can meet before minutes go into a profile."""
    shape = (identity.num_layers, identity.num_kv_heads)
    unmeasured = Profile(
        target.context, np.array([target.context], np.int32), np.zeros((*shape, 1), np.float32),
        np.zeros(shape, np.float32), np.zeros(shape[:1], np.float32), np.zeros(shape, np.float32),
    )  # fmt: skip
    problem = pose(identity, unmeasured, target, policy, sink)
    least = target.batch * least_bytes(problem)
    if target.bytes < least:
        raise TargetError(
            f"a target of {memory.text} ({target.bytes} bytes) is below the {least} bytes that the sinks and one "
            "recent token of every head, and the windows of sliding layers, take together: ask for more memory"
        )


def check_out(out: str | os.PathLike[str] | None) -> None:
    """Refuse a path that cannot be written before minutes go into a profile."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder: expected the name of the file to write")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ArtifactError(f"{path.absolute().parent} is no folder that can be written to: create it or name another")


def _perplexity(
    model: Any, calibration: Calibration, problem: Problem, report: Report | None
) -> Callable[[np.ndarray], float]:
    """Measures budgets at the problem's context on shorter calibration windows, scaled to their length."""
    lengths = [len(window.ids) for window in calibration.windows]
    longest = max((n for n in lengths if n <= SEARCH_TOKENS), default=min(lengths))
    windows = [window.ids for window in calibration.windows if len(window.ids) == longest]
    calls = 0

    def perplexity_of(capacity: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        if report is not None:
            report("searching", calls, 0)
        scaled = np.maximum(np.rint(capacity * (longest / problem.context)), problem.sink + 1).astype(np.int32)
        return perplexity(model, windows, scaled, problem.sink)

    return perplexity_of
