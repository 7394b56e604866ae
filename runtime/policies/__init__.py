"""Token policies by the name that the artifact gives them; a new one is a file here and a line below."""

from __future__ import annotations

from kvcompile.artifacts import register_policy
from kvcompile.kernels.layout import KINDS, RING
from kvcompile.runtime.policies.base import Policy, Prompt
from kvcompile.runtime.policies.h2o import H2O
from kvcompile.runtime.policies.scored import Scored
from kvcompile.runtime.policies.snapkv import SnapKV

POLICIES: dict[str, Policy] = {
    "full": Policy(),  # a ring that is never reached within the artifact's context
    "recent": Policy(),
    "h2o": H2O(),
    "snapkv": SnapKV(),
    "scored": Scored(),
}


def register(name: str, policy: Policy, state_bytes: int = 0) -> None:
    """Add a token policy from outside of the package. `state_bytes` are those a slot of what its `new_state` allocates.

    A policy that observes decides every step itself (`place`); any other decides at the prompt, and its new tokens take
    the slots of the ring in turn. Raises ValueError for a name that is taken.
    """
    if name in POLICIES:
        raise ValueError(f"there is a token policy {name} already")
    register_policy(name, state_bytes)
    POLICIES[name] = policy
    if not policy.observes:
        KINDS[name] = RING


__all__ = ["POLICIES", "Policy", "Prompt", "register"]
