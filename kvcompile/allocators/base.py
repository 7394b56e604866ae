"""What an allocator is."""

from __future__ import annotations

from typing import Protocol

from kvcompile.stages import Plan, Problem


class Allocator(Protocol):
    """Divides a problem's target among the heads. `policies` are the token policies that it can work with, its own
    first."""

    @property
    def policies(self) -> tuple[str, ...]: ...
    def __call__(self, problem: Problem) -> Plan:
        """A plan of at most `problem.target` bytes. Raises TargetError for a target that it cannot meet."""
        ...
