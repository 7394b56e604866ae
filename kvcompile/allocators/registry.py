"""Allocators by name; a new one is a file here and a line below, or a call of `register`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from kvcompile.allocators.baklava import BaKlaVa
from kvcompile.allocators.base import Allocator
from kvcompile.allocators.duo import DuoAttention
from kvcompile.allocators.foreign import following
from kvcompile.allocators.optimal import Optimal
from kvcompile.allocators.predicted import predicted_loss
from kvcompile.allocators.pyramid import PyramidKV
from kvcompile.allocators.rows import all_full, least_bytes, plan_bytes
from kvcompile.allocators.squeeze import SqueezeAttention
from kvcompile.allocators.surfacelogic import SurfaceLogicKV
from kvcompile.allocators.uniform import Uniform
from kvcompile.artifacts import TargetError
from kvcompile.formats import read
from kvcompile.stages import Plan, Problem

ALLOCATORS: dict[str, Allocator] = {
    "optimal": Optimal(),
    "uniform": Uniform(),
    "baklava": BaKlaVa(),
    "squeeze": SqueezeAttention(),
    "surfacelogic": SurfaceLogicKV(),
    "pyramid": PyramidKV(),
    "duo": DuoAttention(),
}

FILE = "file:"
"""Before the path of another system's file, in place of an allocator's name; see `kvcompile.formats`."""


def register(name: str, allocator: Allocator) -> None:
    """Add an allocator, from inside or outside of this package; the same one may be added again.

    Raises:
        ValueError: a name that another allocator has, or that stands for a file.
    """
    if name.startswith(FILE) or ALLOCATORS.setdefault(name, allocator) != allocator:
        raise ValueError(f"the name {name!r} is taken: expected another one for the allocator")


def named(name: str) -> Allocator:
    """The allocator of a name, or of `file:PATH`.

    Raises:
        TargetError: an unknown allocator.
        ExchangeError: a file that cannot be used.
    """
    if name.startswith(FILE):
        return following(read(Path(name.removeprefix(FILE))))
    if name not in ALLOCATORS:
        raise TargetError(f"there is no allocator {name!r}: expected one of {', '.join(ALLOCATORS)}, or {FILE}PATH")
    return ALLOCATORS[name]


def default_policy(name: str) -> str:
    """The token policy that the allocator was published with. Raises as `named` does."""
    return named(name).policies[0]


def check_policy(name: str, policy: str) -> None:
    """Refuse a token policy that the allocator cannot work with.

    Raises:
        TargetError: such a policy; and as `named` does.
    """
    policies = named(name).policies
    if policy not in policies:
        raise TargetError(
            f"the allocator {name} cannot work with the policy {policy!r}: expected one of {', '.join(policies)}"
        )


def allocate(name: str, problem: Problem) -> Plan:
    """Divide the target among the heads. A target at or above the full cache is the full cache, whoever divides it.

    Raises:
        TargetError: an unknown allocator, a policy it cannot work with, or a target below `least_bytes`.
    """
    check_policy(name, problem.policy)
    allocator = named(name)
    least = least_bytes(problem)
    if problem.target < least:
        raise TargetError(
            f"{problem.target} bytes are too few for a sequence: the sinks and one recent token of every head, and the "
            f"sliding windows, take {least}"
        )
    start = time.perf_counter()
    full = all_full(problem)
    whole = plan_bytes(problem, full) <= problem.target
    plan = dataclasses.replace(full, loss=predicted_loss(problem, full)) if whole else allocator(problem)
    assert plan_bytes(problem, plan) <= problem.target, f"{name} went over the target"
    return dataclasses.replace(plan, seconds=time.perf_counter() - start)
