"""Problem -> Plan, one file a method; `registry` has them by name, `refine` improves a plan by measuring it."""

from kvcompile.allocators.base import Allocator
from kvcompile.allocators.refine import solve
from kvcompile.allocators.registry import (
    ALLOCATORS,
    FILE,
    allocate,
    check_policy,
    default_policy,
    named,
    register,
)
from kvcompile.allocators.rows import least_bytes, plan_bytes

__all__ = [
    "ALLOCATORS",
    "Allocator",
    "FILE",
    "allocate",
    "check_policy",
    "default_policy",
    "least_bytes",
    "named",
    "plan_bytes",
    "register",
    "solve",
]
