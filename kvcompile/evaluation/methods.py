"""Who takes part: methods by name, each at the same budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcompile.artifacts import Artifact, TargetError
from kvcompile.compiler import resolve
from kvcompile.evaluation.caches import Contender
from kvcompile.evaluation.codecs import register_codecs
from kvcompile.evaluation.kvzip import kvzip
from kvcompile.evaluation.participant import Participant

Method = Callable[[Artifact, str, str, int], Participant]
"""Makes what takes part, of an artifact, the method's name, a budget as it was asked for and tokens of the context."""


def solved(allocator: str, policy: str | None = None, kv_dtype: str = "auto") -> Method:
    """A plan from the artifact's curves; `policy` None is the allocator's own."""

    def contender(artifact: Artifact, name: str, budget: str, context: int) -> Contender:
        plan = resolve(
            artifact, mem=budget, context=context, batch=1, allocator=allocator, policy=policy, kv_dtype=kv_dtype
        )
        return Contender(name, budget, plan)

    return contender


METHODS: dict[str, Method] = {
    "optimal": solved("optimal"),
    "uniform": solved("uniform"),
    "baklava": solved("baklava"),
    "squeeze": solved("squeeze"),
    "surfacelogic": solved("surfacelogic"),
    "pyramid": solved("pyramid"),
    "duo": solved("duo"),
    "h2o": solved("uniform", "h2o"),
    "snapkv": solved("uniform", "snapkv"),
    "scored": solved("uniform", "scored"),
    "fp8": solved("uniform", kv_dtype="fp8"),
    "turboquant4": solved("uniform", kv_dtype="turboquant4"),
    "turboquant3": solved("uniform", kv_dtype="turboquant3"),
    "kvzip": kvzip,
}
"""Allocators store in the cache dtype, but for `optimal`. `h2o`, `snapkv` and `scored` are these policies with equal
budgets; `fp8` and `turboquant` store all heads so, and where not all tokens fit, the first and the most recent ones.
`kvzip` is an upper reference by masks."""


def contenders(artifact: Artifact, methods: Sequence[str], budgets: Sequence[str], context: int) -> list[Participant]:
    """The artifact itself where it is for this context, and every method at every budget, solved from its curves.

    Raises:
        TargetError: an unknown method, a budget that a method cannot meet, or nothing to measure.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise TargetError(f"there is no method {unknown[0]!r} to compare with: expected some of {', '.join(METHODS)}")
    register_codecs()
    own = [Contender("this artifact", "", artifact)] if artifact.target.context == context else []
    if not own and not (methods and budgets):
        raise TargetError(
            f"nothing is left to measure in {context} tokens: expected methods and budgets, or contexts of "
            f"{artifact.target.context} tokens, which the artifact is for"
        )
    return [*own, *(METHODS[name](artifact, name, budget, context) for budget in budgets for name in methods)]
