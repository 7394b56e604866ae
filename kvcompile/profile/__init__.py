"""Profiling: what losing tokens costs every KV head, and how important the published methods find each."""

from kvcompile.profile.cached import profile
from kvcompile.profile.job import Progress
from kvcompile.profile.measure import Profiled, measure
from kvcompile.profile.measured import measuring
from kvcompile.profile.perplexity import perplexity
from kvcompile.profile.ranks import Ranks, ranks, together
from kvcompile.profile.resume import profile_key
from kvcompile.profile.rotation import read_rotary
from kvcompile.profile.setting import Material, Probe
from kvcompile.profile.simulate import plan_divergence

__all__ = [
    "Material",
    "Probe",
    "Profiled",
    "Ranks",
    "Progress",
    "measure",
    "measuring",
    "perplexity",
    "plan_divergence",
    "profile",
    "profile_key",
    "ranks",
    "read_rotary",
    "together",
]
