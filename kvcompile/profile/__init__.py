"""Profiling: what losing tokens costs every KV head, and how important the published methods find each."""

from kvcompile.profile.measure import Material, Profiled, Progress, measure
from kvcompile.profile.perplexity import perplexity
from kvcompile.profile.probes import Probe
from kvcompile.profile.simulate import plan_divergence
from kvcompile.profile.store import profile_key
from kvcompile.profile.unrotate import read_rotary

__all__ = [
    "Material",
    "Probe",
    "Profiled",
    "Progress",
    "measure",
    "perplexity",
    "plan_divergence",
    "profile_key",
    "read_rotary",
]
