"""How much a profile looks at: thorough, or quick."""

from __future__ import annotations

from dataclasses import dataclass, replace

PROFILE_TOKENS = 1216
"""Longest calibration context by default; a longer one is profiled at this length and its curves are stretched."""


@dataclass(frozen=True)
class Effort:
    """The longest context in `tokens`; one in `every` so many of our families of text; episodes of each to `fit` the
    scorer and the quantiser on, and others to `measure` losses on, with so many `quotes` asked for; retrieval `probes`
    for SurfaceLogicKV's score; and `checks`, whole plans that are run. `gives_up` is what an artifact says of a lesser
    effort, measured in docs/profiling.md."""

    tokens: int = PROFILE_TOKENS
    every: int = 1
    fit: int = 2
    measure: int = 2
    quotes: int = 4
    probes: int = 6
    checks: int = 6
    gives_up: str = ""

    def at(self, tokens: int | None) -> Effort:
        """The same with another longest context, where one is given."""
        return self if tokens is None else replace(self, tokens=tokens)


THOROUGH = Effort()
QUICK = Effort(
    tokens=512, every=2, fit=1, measure=1, quotes=2, probes=1, checks=3,
    gives_up="profiled on shorter contexts and fewer texts: on SmolLM2-135M and Qwen2.5-Coder-0.5B, KL to the full "
    "cache is then 0.8 to 2.6 times what it is otherwise at 12.5 % of the bytes, and 0.9 to 2.4 times at 6.25 %",
)  # fmt: skip
