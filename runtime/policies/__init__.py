"""Token policies by the name that the artifact gives them; a new one is a file here and a line below."""

from __future__ import annotations

from kvcompile.runtime.policies.base import Policy
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

__all__ = ["POLICIES", "Policy"]
