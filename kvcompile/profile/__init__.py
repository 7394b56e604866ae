"""Profiling: what losing tokens costs every KV head, and how important the published methods find each."""

from kvcompile.profile.measure import Material, Profiled, Progress, measure
from kvcompile.profile.perplexity import perplexity
from kvcompile.profile.probes import Probe
from kvcompile.profile.store import profile_key

__all__ = ["Material", "Probe", "Profiled", "Progress", "measure", "perplexity", "profile_key"]
