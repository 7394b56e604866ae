"""Who takes part: allocators by name, each at the same budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcompile.artifacts import Artifact, TargetError
from kvcompile.compiler import resolve

METHODS: dict[str, tuple[str, str | None]] = {
    "optimal": ("optimal", None),
    "uniform": ("uniform", None),
    "baklava": ("baklava", None),
    "squeeze": ("squeeze", None),
    "surfacelogic": ("surfacelogic", None),
    "pyramid": ("pyramid", None),
    "duo": ("duo", None),
    "h2o": ("uniform", "h2o"),
    "snapkv": ("uniform", "snapkv"),
    "scored": ("uniform", "scored"),
}
"""Allocator and token policy (None: the allocator's own) of every method; all but `optimal` store in the cache dtype.
`h2o`, `snapkv` and `scored` are these policies with equal budgets."""


@dataclass(frozen=True)
class Contender:
    """A plan under a name, at a budget as it was asked for ("" for the artifact itself)."""

    method: str
    budget: str
    artifact: Artifact


def contenders(artifact: Artifact, methods: Sequence[str], budgets: Sequence[str], context: int) -> list[Contender]:
    """The artifact itself where it is for this context, and every method at every budget, solved from its curves.

    Raises:
        TargetError: an unknown method, or a budget that a method cannot meet.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise TargetError(f"there is no method {unknown[0]!r} to compare with: expected some of {', '.join(METHODS)}")
    found = [Contender("this artifact", "", artifact)] if artifact.target.context == context else []
    for budget in budgets:
        for name in methods:
            allocator, policy = METHODS[name]
            plan = resolve(artifact, mem=budget, context=context, batch=1, allocator=allocator, policy=policy)
            found.append(Contender(name, budget, plan))
    return found
