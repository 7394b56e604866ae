"""The compiler from end to end: calibrate, profile, solve, write."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvcompile.allocators import allocate, check_policy, default_policy, least_bytes
from kvcompile.artifacts import (
    DTYPE_BITS,
    Artifact,
    ArtifactError,
    ModelIdentity,
    Target,
    TargetError,
    full_bytes,
    groups,
    identify,
    validate,
    write,
)
from kvcompile.assemble import Parts, assemble, pose, stored_parts
from kvcompile.memory import Memory, parse_memory
from kvcompile.problem import DEFAULT_SINK, Plan, Problem, Profile

KV_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Names of `--kv-dtype` that are the cache's own element type; `auto` is the model's."""

WIDTHS = {"int8": 8, "int4": 4}
"""Names of `--kv-dtype` under which every key and value is quantised."""

PROFILE_TOKENS = 2048
"""Longest calibration context by default; a longer one is profiled at this length and its curves are stretched."""
FIT_EPISODES = 2
"""Episodes of each family that the scorer and the quantiser are fitted on."""
MEASURE_EPISODES = 2
"""Other episodes of each family that the losses are measured on."""
PROBES = 6

Report = Callable[[str, int, int], None]
"""Called with the stage's name, the work done and the work in all."""


@dataclass(frozen=True)
class Options:
    """What a plan is to be like, whatever it is solved from.

    `context` and `batch` default to the model's longest context, or the artifact's, and 1. `allocator` is a name from
    `kvcompile.allocators.ALLOCATORS`; `policy` is `recent`, `window` (recent without sinks), `h2o`, `snapkv` or
    `scored`, by default the allocator's own. `kv_dtype` is `auto` (the model's type; the allocator `optimal` may also
    choose 8 and 4 bits), `bf16`, `fp16`, `fp32`, `int8` or `int4`. `classes` is the most distinct choices in a layer,
    `ranks` the number of tensor-parallel ranks to place heads on.
    """

    context: int | None = None
    batch: int | None = None
    allocator: str = "optimal"
    policy: str | None = None
    kv_dtype: str = "auto"
    classes: int | None = None
    ranks: int | None = None

    def with_defaults(self, context: int, batch: int) -> Options:
        """These options, with a context and a batch where none are given."""
        return dataclasses.replace(
            self,
            context=context if self.context is None else self.context,
            batch=batch if self.batch is None else self.batch,
        )


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
    classes: int | None = None,
    ranks: int | None = None,
    refine: int = 0,
    seed: int = 0,
    profile_tokens: int = PROFILE_TOKENS,
    name: str | None = None,
    report: Report | None = None,
) -> Artifact:
    """Compile the KV cache of a transformers causal LM to a memory target and, with `out`, write the artifact.

    Args:
        mem: bytes (`8GB`, `512MiB`), or a share (`25%`) of the full cache for `batch` sequences of `context` tokens.
        context, batch, allocator, policy, kv_dtype, classes, ranks: see `Options`.
        calib: a file or folder with text to calibrate on, beside what the package and the Python installation carry.
        refine: rounds in which the plan is measured and solved anew; a plan is kept only if it measures better.
        profile_tokens: the longest context that is profiled, in tokens; a longer `context` stretches its curves.
        name: under which `kvcompile run` finds the model again; default: the model's own.

    An interrupted profile resumes where it stopped, and a finished one serves the next target too (`KVCOMPILE_CACHE`).

    Raises:
        KvcompileError: an impossible target, an unsupported model, too little text, or an `out` that cannot be written.
    """
    options = Options(context, batch, allocator, policy, kv_dtype, classes, ranks)
    wanted = {mem: None if out is None else Path(out)}
    return build_many(
        model, tokenizer, wanted, options, calib=calib, refine=refine, seed=seed, profile_tokens=profile_tokens,
        name=name, report=report,
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
    profile_tokens: int = PROFILE_TOKENS,
    name: str | None = None,
    report: Report | None = None,
) -> list[Artifact]:
    """One artifact for every memory target in `wanted` (and the file to write it to), from one profile."""
    # Here and not above: `resolve` needs neither torch nor transformers.
    from kvcompile.models import fast_arithmetic
    from kvcompile.profiling import profile_model

    identity = identify(model, name or str(model.config.name_or_path or model.config.model_type))
    longest = int(model.config.get_text_config().max_position_embeddings)
    options = options.with_defaults(longest, 1)
    targets = [check(identity, mem, options, out) for mem, out in wanted.items()]
    context = options.context or longest
    length = min(context, profile_tokens)
    with fast_arithmetic(model):
        profiled = profile_model(
            model, tokenizer, identity, length=length, context=context, calib=calib, seed=seed, report=report
        )
        return [
            finish(identity, profiled.parts, target, options, profiled.calibration, out, profiled.tools(refine, report))
            for target, out in zip(targets, wanted.values(), strict=True)
        ]


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
    parts: Parts | None = None,
) -> Artifact:
    """Solve another target from the curves inside an artifact, without the model. Arguments as for `build`, with the
    artifact's own context and batch as defaults; `parts` are its `stored_parts`, for who solves several targets.

    Raises:
        KvcompileError: an impossible target, an artifact without curves, or an `out` that cannot be written.
    """
    options = Options(context, batch, allocator, policy, kv_dtype, classes, ranks)
    options = options.with_defaults(artifact.target.context, artifact.target.batch)
    path = None if out is None else Path(out)
    parts = parts or stored_parts(artifact)
    target = check(artifact.model, mem, options, path, artifact.target.dtype, parts)
    check_positions(artifact, parts, target, options)
    return finish(artifact.model, parts, target, options, dict(artifact.calibration), path)


@dataclass(frozen=True)
class Tools:
    """What solving can use where a model is at hand: `perplexity` of a table of `recent` budgets for a problem, and
    `refine`, which may improve a plan by measuring."""

    perplexity: Callable[[Problem], Callable[[np.ndarray], float]]
    refine: Callable[[Problem, Plan], Plan]


def finish(
    identity: ModelIdentity,
    parts: Parts,
    target: Target,
    options: Options,
    calibration: dict[str, Any],
    out: Path | None,
    tools: Tools | None = None,
) -> Artifact:
    """Solve, assemble and write."""
    problem = pose_with(identity, parts, target, options)
    if tools is not None:
        problem = dataclasses.replace(problem, perplexity=tools.perplexity(problem))
    plan = allocate(options.allocator, problem)
    if tools is not None and options.allocator == "optimal":
        plan = tools.refine(problem, plan)
    joint = options.allocator == "optimal" and options.policy is None
    solver = {
        "allocator": options.allocator, "policy": "joint" if joint else problem.policy, "sink": problem.sink,
    }  # fmt: skip
    made = parts.at_context(identity, target.context)
    artifact = assemble(identity, made, target, plan, solver=solver, calibration=calibration, ranks=options.ranks)
    if out is None:
        validate(artifact, "the plan")
    else:
        write(artifact, out)
    return artifact


def pose_with(identity: ModelIdentity, parts: Parts, target: Target, options: Options) -> Problem:
    """The problem of one target under the options."""
    policy, sink = resolve_policy(options.allocator, options.policy)
    own = DTYPE_BITS[target.dtype]
    widths: tuple[int, ...] = (own,)
    if options.kv_dtype in WIDTHS:
        widths = (WIDTHS[options.kv_dtype],)
    elif quantised_widths(identity, options):
        widths = (own, *sorted((int(bits) for bits in parts.profile.bits), reverse=True))
    profile = parts.profile
    if options.allocator == "optimal" and options.policy in ("recent", "window"):
        ring = profile.shares >= 1
        profile = dataclasses.replace(profile, shares=profile.shares[ring], loss=profile.loss[..., ring, :])
    return pose(identity, profile, target, policy, sink, widths, options.classes)


def quantised_widths(identity: ModelIdentity, options: Options) -> bool:
    """Whether a plan under the options may have quantised heads."""
    joint = options.kv_dtype == "auto" and options.allocator == "optimal" and roundable(identity)
    return joint or options.kv_dtype in WIDTHS


def check_positions(artifact: Artifact, parts: Parts, target: Target, options: Options) -> None:
    """Refuse to quantise keys for positions that the artifact says nothing about."""
    context, keys = target.context, parts.profile.keys
    if context == artifact.target.context or not quantised_widths(artifact.model, options):
        return
    advice = "build anew with --model, or give --kv-dtype bf16 for a plan without quantised heads"
    if keys is None and context > parts.profile.window and parts.quantiser is not None:
        raise TargetError(
            f"the artifact is of a revision that fitted its quantiser to the first {parts.profile.window} positions "
            f"alone, which {context} tokens outgrow: {advice}"
        )
    if keys is not None and not keys.rotary.serves(context):
        raise TargetError(
            f"the model's rotary embedding changes with the length of a sequence, and the artifact holds that of "
            f"{keys.rotary.context} tokens, not of {context}: {advice}"
        )


def roundable(identity: ModelIdentity) -> bool:
    """Whether keys and values split into groups of pairs of elements, as 4 and 8 bits need."""
    return identity.head_dim % (2 * groups(identity.head_dim)) == 0


def resolve_target(
    identity: ModelIdentity, memory: Memory, context: int, batch: int, kv_dtype: str, own: str | None = None
) -> Target:
    """The target in bytes, and what it is for; `own` is the element type under `auto`, by default the model's."""
    if context < 1 or batch < 1:
        raise TargetError(f"a context of {context} tokens and a batch of {batch} were given: expected at least 1")
    dtype = own or identity.dtype
    if kv_dtype != "auto" and kv_dtype not in WIDTHS:
        dtype = KV_DTYPES.get(kv_dtype, kv_dtype)
    if dtype not in KV_DTYPES.values():
        known = ", ".join((*KV_DTYPES, *WIDTHS))
        raise TargetError(f"there is no cache type {kv_dtype!r}: expected one of auto, {known}")
    full = batch * full_bytes(identity, context, dtype)
    return Target(bytes=memory.bytes(full), context=context, batch=batch, dtype=dtype)


def resolve_policy(allocator: str, policy: str | None) -> tuple[str, int]:
    """The token policy and its sinks; `window` is `recent` without sinks."""
    default = default_policy(allocator)
    return ("recent", 0) if policy == "window" else (policy or default, DEFAULT_SINK)


def check(
    identity: ModelIdentity,
    mem: str,
    options: Options,
    out: Path | None,
    own: str | None = None,
    parts: Parts | None = None,
) -> Target:
    """The target, refused where nothing can meet it or the file cannot be written, before minutes go into a profile;
    `own` and `parts` are those of an artifact that is solved anew."""
    memory = parse_memory(mem)
    check_out(out)
    assert options.context is not None
    assert options.batch is not None
    target = resolve_target(identity, memory, options.context, options.batch, options.kv_dtype, own)
    if options.ranks is not None and (options.ranks < 1 or identity.num_kv_heads % options.ranks):
        heads = identity.num_kv_heads
        raise TargetError(f"{heads} KV heads do not divide among {options.ranks} ranks: expected a divisor with --tp")
    check_policy(options.allocator, resolve_policy(options.allocator, options.policy)[0])
    if options.classes is not None and options.allocator != "optimal":
        raise TargetError(f"the allocator {options.allocator} knows no --classes-per-layer: use --allocator optimal")
    if options.classes is not None and options.classes < 1:
        raise TargetError(f"{options.classes} classes a layer were asked for: expected at least 1")
    if options.kv_dtype in WIDTHS and not roundable(identity):
        raise TargetError(f"keys and values of {identity.head_dim} elements cannot be quantised: use --kv-dtype auto")
    if options.policy == "scored" and parts is not None and parts.scorer is None:
        raise TargetError("the artifact has no scorer, as it is of format version 1: build anew with --model")
    if options.kv_dtype in WIDTHS and parts is not None and parts.quantiser is None:
        raise TargetError("the artifact has no quantiser, as it is of format version 1: build anew with --model")
    parts = parts or Parts(unmeasured(identity, target.context), None, None)
    problem = pose_with(identity, parts, target, options)
    least = target.batch * least_bytes(problem)
    if target.bytes < least:
        raise TargetError(
            f"a target of {memory.text} ({target.bytes} bytes) is below the {least} bytes that the sinks and one "
            "recent token of every head, and the windows of sliding layers, take together: ask for more memory"
        )
    return target


def unmeasured(identity: ModelIdentity, context: int) -> Profile:
    """A profile of the right shape that says nothing."""
    heads = (identity.num_layers, identity.num_kv_heads)
    table = np.zeros((1, *heads, 1), np.float32)
    return Profile(
        families=("text",), window=context, tokens=np.array([context], np.int32), shares=np.ones(1, np.float32),
        loss=table[..., None], bits=np.array([8, 4], np.int32), key_loss=np.repeat(table, 2, -1),
        value_loss=np.repeat(table, 2, -1), factor=1.0, correlation=float("nan"), baklava=table[0, ..., 0],
        squeeze=table[0, :, 0, 0], surfacelogic=table[0, ..., 0],
    )  # fmt: skip


def check_out(out: str | os.PathLike[str] | None) -> None:
    """Refuse a path that cannot be written before minutes go into a profile."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder: expected the name of the file to write")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ArtifactError(f"{path.absolute().parent} is no folder that can be written to: create it or name another")
