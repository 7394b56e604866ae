"""What is refused before minutes go into a profile."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvcompile.allocators import check_policy, least_bytes
from kvcompile.artifacts import (
    Artifact,
    ArtifactError,
    ModelIdentity,
    Target,
    TargetError,
    chunk_of,
    full_bytes,
    state_bytes,
    states_name,
)
from kvcompile.artifacts.checks import MAX_BATCH, MAX_BYTES, MAX_TOKENS, show
from kvcompile.kernels.codecs import codec_of, is_quantised, names
from kvcompile.problem.memory import Memory, parse_memory
from kvcompile.problem.options import KV_DTYPES, Options
from kvcompile.problem.pages import page_target
from kvcompile.problem.posing import may_quantise, pose_with, resolve_policy, unmeasured
from kvcompile.stages import Parts


def check_positions(artifact: Artifact, parts: Parts, target: Target, options: Options) -> None:
    """Refuse to transform keys for positions that the artifact says nothing about."""
    context, keys = target.context, parts.profile.keys
    if not may_transform(artifact.model, options):
        return
    advice = "build anew with --model, or give --kv-dtype bf16 for a plan without quantised heads"
    # A file's context alone says nothing: it may have been solved, without quantised keys, from one of another context.
    made = context == artifact.target.context and has_transformed_keys(artifact)
    if keys is None and context > parts.profile.window and parts.quantiser is not None and not made:
        raise TargetError(
            f"the artifact is of a revision that fitted its quantiser to the first {parts.profile.window} positions "
            f"alone, which {context} tokens outgrow: {advice}"
        )
    if keys is not None and not keys.rotary.serves(context):
        raise TargetError(
            f"the model's rotary embedding changes with the length of a sequence, and the artifact holds that of "
            f"{keys.rotary.context} tokens, not of {context}: {advice}"
        )


def may_transform(identity: ModelIdentity, options: Options) -> bool:
    """Whether a plan under the options may have keys in a codec that takes a transform."""
    some = options.kv_dtype not in names() or codec_of(names()[options.kv_dtype]).needs_transform
    return some and may_quantise(identity, options)


def has_transformed_keys(artifact: Artifact) -> bool:
    """Whether any head's keys are in a codec that takes a transform."""
    used = np.unique(artifact.budgets.k_bits).tolist()
    return any(is_quantised(bits) and codec_of(bits).needs_transform for bits in used)


def resolve_target(
    identity: ModelIdentity, memory: Memory, context: int, batch: int, kv_dtype: str, own: str | None = None
) -> Target:
    """The target in bytes, and what it is for; `own` is the element type under `auto`, by default the model's."""
    if context < 1 or batch < 1:
        raise TargetError(f"a context of {context} tokens and a batch of {batch} were given: expected at least 1")
    if context > MAX_TOKENS or batch > MAX_BATCH:
        raise TargetError(
            f"a context of {context} tokens and a batch of {batch} were given: expected at most {MAX_TOKENS} tokens "
            f"and a batch of {MAX_BATCH}"
        )
    dtype = own or identity.dtype
    if kv_dtype != "auto" and kv_dtype not in names():
        dtype = KV_DTYPES.get(kv_dtype, kv_dtype)
    if dtype not in KV_DTYPES.values():
        known = ", ".join((*KV_DTYPES, *names()))
        raise TargetError(f"there is no cache type {kv_dtype!r}: expected one of auto, {known}")
    full = batch * full_bytes(identity, context, dtype)
    target = Target(bytes=memory.bytes(full), context=context, batch=batch, dtype=dtype)
    if max(target.bytes, full) > MAX_BYTES:
        raise TargetError(
            f"a target of {memory.text} ({target.bytes} bytes), and a full cache of {full} bytes, are more than an "
            f"artifact counts: expected at most {MAX_BYTES} bytes each"
        )
    return target


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
    chunk = chunk_of(identity)
    if chunk is not None and options.context > chunk:
        raise TargetError(
            f"the model attends in chunks of {chunk} tokens, and a plan is for the first one alone: expected a "
            f"--context of at most {chunk}, not {options.context}"
        )
    target = resolve_target(identity, memory, options.context, options.batch, options.kv_dtype, own)
    if options.sequences is not None:
        memory = page_target(memory, options.sequences, identity, target.dtype, options.ranks or 1)
        target = replace(target, bytes=memory.bytes(full=0))
    if options.ranks is not None and (options.ranks < 1 or identity.num_kv_heads % options.ranks):
        heads = identity.num_kv_heads
        raise TargetError(f"{heads} KV heads do not divide among {options.ranks} ranks: expected a divisor with --tp")
    check_policy(options.allocator, resolve_policy(options.allocator, options.policy)[0])
    if options.classes is not None and options.allocator != "optimal":
        raise TargetError(f"the allocator {options.allocator} knows no --classes-per-layer: use --allocator optimal")
    if options.classes is not None and options.classes < 1:
        raise TargetError(f"{options.classes} classes a layer were asked for: expected at least 1")
    codec = codec_of(names()[options.kv_dtype]) if options.kv_dtype in names() else None
    if codec is not None and not codec.fits(identity.head_dim):
        raise TargetError(f"keys and values of {identity.head_dim} elements cannot be quantised: use --kv-dtype auto")
    if options.policy == "scored" and parts is not None and parts.scorer is None:
        raise TargetError("the artifact has no scorer, as it is of format version 1: build anew with --model")
    if codec is not None and codec.needs_transform and parts is not None and parts.quantiser is None:
        raise TargetError("the artifact has no quantiser, as it is of format version 1: build anew with --model")
    parts = parts or Parts(unmeasured(identity, target.context), None, None)
    problem = pose_with(identity, parts, target, options)
    states = state_bytes(identity, target.dtype)
    least = target.batch * (least_bytes(problem) + states)
    if target.bytes < least:
        beside = f", and the {states_name(identity)}" if states else ""
        raise TargetError(
            f"a target of {memory.text} ({target.bytes} bytes) is below the {least} bytes that the sinks and one "
            f"recent token of every head, and the windows of sliding layers{beside}, take together: ask for more memory"
        )
    return target


def check_out(out: str | os.PathLike[str] | None) -> None:
    """Refuse a path that cannot be written before minutes go into a profile."""
    if out is None:
        return
    path = Path(out)
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            path.stat()  # `is_dir` hides the reason, or not, by the version of Python
    except OSError as error:
        raise ArtifactError(f"{show(str(path))} cannot be written ({error.strerror}): name another file") from None
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder: expected the name of the file to write")
    if path.exists() and not path.is_file():
        raise ArtifactError(f"{path} is no regular file: expected the name of the file to write")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ArtifactError(f"{path.absolute().parent} is no folder that can be written to: create it or name another")
