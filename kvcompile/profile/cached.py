"""The profile of a model and a text: measured, or taken up from the cache folder."""

from __future__ import annotations

from typing import Any

from kvcompile.artifacts import ModelIdentity
from kvcompile.calibration import Calibration
from kvcompile.models.cache_dir import cache_dir
from kvcompile.profile.measure import Profiled, measure
from kvcompile.profile.resume import profile_key
from kvcompile.profile.rotation import read_rotary
from kvcompile.profile.setting import Material
from kvcompile.stages import DEFAULT_SINK, Report


def profile(
    model: Any, text: Calibration, identity: ModelIdentity, *, context: int, report: Report | None = None
) -> Profiled:
    """Profile a model on a text, or take up the profile that the cache folder has of them, for plans of `context`
    tokens."""
    key = profile_key(
        fingerprint=identity.fingerprint,
        calibration=text.sha256,
        dtype=f"{identity.dtype}, computed in {model.dtype}",
        seed=text.seed,
        sink=DEFAULT_SINK,
    )
    profiled = measure(
        model,
        Material(text.fit, text.measure, text.probes),
        seed=text.seed,
        progress=report and (lambda done, total: report("profiling", done, total)),
        store=cache_dir("profiles", key),
    )
    return profiled.for_context(read_rotary(model, context))
