"""A target and options -> `Problem`: what may be asked for, what is refused at once, what an allocator is given."""

from kvcompile.problem.checks import check, check_out, check_positions, resolve_target
from kvcompile.problem.memory import Memory, parse_memory
from kvcompile.problem.options import KV_DTYPES, Options
from kvcompile.problem.pages import check_sequences
from kvcompile.problem.posing import pose, pose_with, resolve_policy, solver_report, unmeasured

__all__ = [
    "KV_DTYPES",
    "Memory",
    "Options",
    "check",
    "check_out",
    "check_positions",
    "check_sequences",
    "parse_memory",
    "pose",
    "pose_with",
    "resolve_policy",
    "resolve_target",
    "solver_report",
    "unmeasured",
]
