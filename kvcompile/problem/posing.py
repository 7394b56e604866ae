"""From a profile, a target and options to the problem that an allocator solves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators import default_policy
from kvcompile.artifacts import DTYPE_BITS, ModelIdentity, Target, state_bytes, token_limits
from kvcompile.kernels.codecs import CODECS, codec_of, names, profiled
from kvcompile.problem.options import Options
from kvcompile.quantiser import Positions, key_growth, layer_positions
from kvcompile.stages import DEFAULT_SINK, Parts, Problem, Profile


def pose_with(identity: ModelIdentity, parts: Parts, target: Target, options: Options) -> Problem:
    """The problem of one target under the options."""
    policy, sink = resolve_policy(options.allocator, options.policy)
    own = DTYPE_BITS[target.dtype]
    profile = parts.profile
    bits: tuple[tuple[int, ...], tuple[int, ...]] = (own,), (own,)
    if options.kv_dtype in names():
        bits = (names()[options.kv_dtype],), (names()[options.kv_dtype],)
    elif may_quantise(identity, options):
        bits = (own, *measured(identity, profile.key_bits)), (own, *measured(identity, profile.value_bits))
    if options.allocator == "optimal" and options.policy in ("recent", "window"):
        ring = profile.shares >= 1
        profile = dataclasses.replace(profile, shares=profile.shares[ring], loss=profile.loss[..., ring, :])
    return pose(identity, profile, target, policy, sink, bits, options.classes)


def measured(identity: ModelIdentity, ids: NDArray[np.int32]) -> tuple[int, ...]:
    """Of the codecs with these ids, whose losses are known, those that fit the model's keys and values; those of more
    bits first."""
    known = [codec_of(int(bits)) for bits in ids if int(bits) in CODECS]
    return tuple(c.id for c in sorted(known, key=lambda c: -c.bits) if c.fits(identity.head_dim))


def may_quantise(identity: ModelIdentity, options: Options) -> bool:
    """Whether a plan under the options may have quantised heads."""
    some = any(codec_of(bits).fits(identity.head_dim) for bits in profiled("k") + profiled("v"))
    return options.kv_dtype in names() or (options.kv_dtype == "auto" and options.allocator == "optimal" and some)


def resolve_policy(allocator: str, policy: str | None) -> tuple[str, int]:
    """The token policy and its sinks; `window` is `recent` without sinks."""
    default = default_policy(allocator)
    return ("recent", 0) if policy == "window" else (policy or default, DEFAULT_SINK)


def pose(
    model: ModelIdentity,
    profile: Profile,
    target: Target,
    policy: str,
    sink: int,
    bits: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    classes: int | None = None,
) -> Problem:
    """One sequence's share of a target, as a problem for an allocator; `bits` of keys and of values default to those of
    the cache dtype alone."""
    limit, windows = np.array(token_limits(model.windows, target.context), np.int32), np.array(model.windows, np.int32)
    own = DTYPE_BITS[target.dtype]
    growth: NDArray[np.float64] | float = 1.0
    k_bits, v_bits = bits or ((own,), (own,))
    if profile.keys is not None and set(k_bits) - {own}:
        measured = (Positions(0, profile.window),) * model.num_layers
        growth = key_growth(profile.keys, measured, layer_positions(limit.tolist(), target.context))
    return Problem(
        profile=profile,
        limit=limit,
        # Of layers that kept a sliding window in the profile, nobody knows what fewer tokens or bits would lose.
        fixed=(limit < target.context) | (windows > 0) & (windows < profile.window),
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype_bits=own,
        key_bits=k_bits,
        value_bits=v_bits,
        # What is left for keys and values: what other layers have is there whatever the plan.
        target=target.bytes // target.batch - state_bytes(model, target.dtype),
        context=target.context,
        key_growth=growth,
        policy=policy,
        sink=sink,
        classes=classes,
    )


def unmeasured(identity: ModelIdentity, context: int) -> Profile:
    """A profile of the right shape that says nothing."""
    heads = (identity.num_layers, identity.num_kv_heads)
    table = np.zeros((1, *heads, 1), np.float32)
    keys, values = profiled("k"), profiled("v")
    return Profile(
        families=("text",), window=context, tokens=np.array([context], np.int32), shares=np.ones(1, np.float32),
        loss=table[..., None], key_bits=np.array(keys, np.int32), value_bits=np.array(values, np.int32),
        key_loss=np.repeat(table, len(keys), -1), value_loss=np.repeat(table, len(values), -1), factor=1.0,
        correlation=float("nan"), baklava=table[0, ..., 0], squeeze=table[0, :, 0, 0], surfacelogic=table[0, ..., 0],
    )  # fmt: skip


def solver_report(options: Options, problem: Problem) -> dict[str, Any]:
    """How an artifact's plan was asked for, for people."""
    joint = options.allocator == "optimal" and options.policy is None
    return {
        "allocator": options.allocator, "policy": "joint" if joint else problem.policy, "sink": problem.sink,
    }  # fmt: skip
