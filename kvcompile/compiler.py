"""The compiler from end to end: calibrate, profile, pose, solve, assemble, write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcompile.allocators import solve
from kvcompile.artifacts import Artifact, ModelIdentity, Target, check_model, chunk_of, identify, validate, write
from kvcompile.assemble import assemble, stored_parts
from kvcompile.effort import QUICK, THOROUGH, Effort
from kvcompile.problem import Options, check, check_positions, check_sequences, pose_with, solver_report
from kvcompile.stages import Parts, Report, Tools


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""


def build(
    model: Any,
    tokenizer: Any,
    *,
    mem: str,
    context: int | None = None,
    batch: int | None = None,
    out: str | os.PathLike[str] | None = None,
    allocator: str = "optimal",
    policy: str | None = None,
    kv_dtype: str = "auto",
    calib: str | os.PathLike[str] | None = None,
    classes: int | None = None,
    ranks: int | None = None,
    sequences: int | None = None,
    refine: int = 0,
    seed: int = 0,
    quick: bool = False,
    profile_tokens: int | None = None,
    profile_memory: int | None = None,
    name: str | None = None,
    report: Report | None = None,
) -> Artifact:
    """Compile the KV cache of a transformers causal LM to a memory target and, with `out`, write the artifact.

    Args:
        mem: bytes (`8GB`, `512MiB`), or a share (`25%`) of the full cache for `batch` sequences of `context` tokens;
            with `sequences`, the bytes that a serving engine has for its cache.
        context, batch, allocator, policy, kv_dtype, classes, ranks, sequences: see `Options`.
        calib: a file or folder with text to calibrate on, beside what the package and the Python installation carry.
        refine: rounds in which the plan is measured and solved anew; a plan is kept only if it measures better.
        quick: profile less, for a first look; the artifact's `calibration` says what that gives up.
        profile_tokens: the longest context that is profiled, in tokens; a longer `context` stretches its curves.
            Default: that of the `Effort`.
        profile_memory: bytes that profiling may take, the model's weights included; what its episodes need between
            passes is on disk beyond. Default: what is free.
        name: under which `kvcompile run` finds the model again; default: the model's own.

    An interrupted profile resumes where it stopped, and a finished one serves the next target too (`KVCOMPILE_CACHE`).

    Raises:
        KvcompileError: an impossible target, an unsupported model, too little text, or an `out` that cannot be written.
    """
    options = Options(context, batch, allocator, policy, kv_dtype, classes, ranks, sequences)
    wanted = {mem: None if out is None else Path(out)}
    return build_many(
        model, tokenizer, wanted, options, calib=calib, refine=refine, seed=seed,
        effort=(QUICK if quick else THOROUGH).at(profile_tokens), profile_memory=profile_memory, name=name,
        report=report,
    )[0]  # fmt: skip


def build_many(
    model: Any,
    tokenizer: Any,
    wanted: Mapping[str, Path | None],
    options: Options,
    *,
    calib: str | os.PathLike[str] | None = None,
    refine: int = 0,
    seed: int = 0,
    effort: Effort = THOROUGH,
    profile_memory: int | None = None,
    name: str | None = None,
    report: Report | None = None,
) -> list[Artifact]:
    """One artifact for every memory target in `wanted` (and the file to write it to), from one profile. Of several
    processes that profile together, the first one alone solves and writes; the others have nothing to return."""
    check_sequences(options, wanted)
    # Here and not above: `resolve` needs neither torch nor transformers.
    from kvcompile.calibration import calibrate
    from kvcompile.models import fast_arithmetic, one_blas_thread, sampler
    from kvcompile.profile import measuring, profile, ranks

    identity = identify(model, name or str(model.config.name_or_path or model.config.model_type), sampler(model))
    check_model(identity, "the model")
    longest = int(model.config.get_text_config().max_position_embeddings)
    options = options.with_defaults(longest, 1)
    context = options.context or longest
    targets = [check(identity, mem, options, out) for mem, out in wanted.items()]
    report = report or _silent
    with fast_arithmetic(model), one_blas_thread():
        # What is asked after a context, a replay of it at most, has to end within a chunk too.
        longest = min(effort.tokens, (chunk_of(identity) or 3 * effort.tokens) // 3)
        text = calibrate(
            tokenizer, length=min(context, longest), fit=effort.fit, measure=effort.measure,
            quotes=effort.quotes, probes=effort.probes, seed=seed, path=calib, every=effort.every,
        )  # fmt: skip
        profiled = profile(
            model, text, identity, context=context, checks=effort.checks, report=report, memory=profile_memory
        )
        if ranks().rank > 0:
            return []
        calibration, tools = {**text.describe(), **profiled.describe()}, measuring(model, text, profiled, report)
        if effort.gives_up:
            calibration["quick"] = effort.gives_up
        built = [
            finish(identity, profiled.parts, target, options, calibration, None, tools, refine, report)
            for target in targets
        ]
    for artifact, out in zip(built, wanted.values(), strict=True):
        if out is not None:
            write(artifact, out)
    return built


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
    classes: int | None = None,
    ranks: int | None = None,
    sequences: int | None = None,
    parts: Parts | None = None,
) -> Artifact:
    """Solve another target from the curves inside an artifact, without the model. Arguments as for `build`, with the
    artifact's own context and batch as defaults; `parts` are its `stored_parts`, for who solves several targets.

    Raises:
        KvcompileError: an impossible target, an artifact without curves, or an `out` that cannot be written.
    """
    options = Options(context, batch, allocator, policy, kv_dtype, classes, ranks, sequences)
    check_sequences(options, [mem])
    options = options.with_defaults(artifact.target.context, artifact.target.batch)
    path = None if out is None else Path(out)
    parts = parts or stored_parts(artifact)
    target = check(artifact.model, mem, options, path, artifact.target.dtype, parts)
    check_positions(artifact, parts, target, options)
    return finish(artifact.model, parts, target, options, dict(artifact.calibration), path)


def finish(
    identity: ModelIdentity,
    parts: Parts,
    target: Target,
    options: Options,
    calibration: Mapping[str, Any],
    out: Path | None,
    tools: Tools | None = None,
    refine: int = 0,
    report: Report = _silent,
) -> Artifact:
    """Pose, solve, assemble and write."""
    report("solving", 0, 0)
    problem = pose_with(identity, parts, target, options)
    plan = solve(options.allocator, problem, tools, refine)
    artifact = assemble(
        identity, parts, target, plan, solver=solver_report(options, problem), calibration=calibration,
        ranks=options.ranks,
    )  # fmt: skip
    if out is None:
        validate(artifact, "the plan")
    else:
        write(artifact, out)
    return artifact
