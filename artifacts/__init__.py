"""The `.kvb` format: what a compiled cache is, how it is written, read and checked. `FORMAT.md` specifies it."""

from kvcompile.artifacts.errors import (
    ArtifactError,
    CacheError,
    CalibrationError,
    KvcompileError,
    ModelError,
    TargetError,
)
from kvcompile.artifacts.identity import check_identity, identify
from kvcompile.artifacts.parse import from_bytes, read
from kvcompile.artifacts.schema import (
    DTYPE_BITS,
    FORMAT_VERSION,
    POLICIES,
    STATE_BYTES,
    Artifact,
    Budgets,
    ByteAccount,
    ModelIdentity,
    Target,
    full_bytes,
    resident_bytes,
    slot_bytes,
    token_limits,
)
from kvcompile.artifacts.serialize import to_bytes, write
from kvcompile.artifacts.validate import validate

__all__ = [
    "Artifact",
    "ArtifactError",
    "Budgets",
    "ByteAccount",
    "CacheError",
    "CalibrationError",
    "DTYPE_BITS",
    "FORMAT_VERSION",
    "KvcompileError",
    "ModelError",
    "ModelIdentity",
    "POLICIES",
    "STATE_BYTES",
    "Target",
    "TargetError",
    "check_identity",
    "from_bytes",
    "full_bytes",
    "identify",
    "read",
    "resident_bytes",
    "slot_bytes",
    "to_bytes",
    "token_limits",
    "validate",
    "write",
]
