"""The profile of a model and a text: measured, or taken up from the cache folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kvcompile.artifacts import ModelIdentity
from kvcompile.calibration import Calibration
from kvcompile.effort import THOROUGH
from kvcompile.models.cache_dir import cache_dir
from kvcompile.models.room import room
from kvcompile.profile.held import complaining
from kvcompile.profile.measure import Profiled, measure
from kvcompile.profile.resume import Sums, load, profile_key, save
from kvcompile.profile.rotation import read_rotaries
from kvcompile.profile.setting import Material
from kvcompile.profile.structure import device_of, head_dim, planned_layers
from kvcompile.stages import DEFAULT_SINK, Report, Rotary


def profile(
    model: Any,
    text: Calibration,
    identity: ModelIdentity,
    *,
    context: int,
    checks: int = THOROUGH.checks,
    report: Report | None = None,
    memory: int | None = None,
) -> Profiled:
    """Profile a model on a text, or take up the profile that the cache folder has of them, for plans of `context`
    tokens; within `memory` bytes, or what is free. `checks` whole plans are run."""
    key = profile_key(
        fingerprint=identity.fingerprint,
        calibration=text.sha256,
        dtype=f"{identity.dtype}, computed in {model.dtype}",
        seed=text.seed,
        sink=DEFAULT_SINK,
        checks=checks,
    )
    store = cache_dir("profiles", key)
    window = max(len(episode.context) for episode in text.measure)
    with complaining(store):
        at_window, at_context = _rotaries(model, (window, context), store)
    profiled = measure(
        model,
        Material(text.fit, text.measure, text.probes, checks),
        seed=text.seed,
        progress=report and (lambda done, total: report("profiling", done, total)),
        store=store,
        rotary=at_window,
        room=room(model, device_of(model), memory, window),
        waiting=report and (lambda: report("waiting for another build, which measures the same profile", 0, 0)),
    )
    return profiled.for_context(at_context)


def _rotaries(model: Any, contexts: tuple[int, ...], store: Path) -> list[Rotary]:
    """The model's rotary embedding in sequences of so many tokens; kept in `store`, as reading it anew would read all
    of the model."""
    num_layers, size = len(planned_layers(model)), head_dim(model)
    found: dict[int, Rotary] = {}
    for length in contexts:
        fresh: Sums = {
            "frequency": np.zeros((num_layers, size), np.float32),
            "partner": np.zeros(size, np.int32),
            "context": np.zeros((), np.int64),
        }
        kept = load(store, fresh, _file(length))
        if kept is not fresh:
            found[length] = Rotary(kept["frequency"], kept["partner"], int(kept["context"]))
    if missing := [length for length in dict.fromkeys(contexts) if length not in found]:
        for length, rotary in zip(missing, read_rotaries(model, missing), strict=True):
            found[length] = rotary
            save(store, {name: np.asarray(value) for name, value in vars(rotary).items()}, _file(length))
    return [found[length] for length in contexts]


def _file(length: int) -> str:
    return f"rotary-{length}.npz"
