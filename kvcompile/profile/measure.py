"""The whole profile of a model: every window and probe in turn, summed in float64, resumable after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts.errors import CalibrationError, ModelError
from kvcompile.problem import DEFAULT_SINK, Profile
from kvcompile.profile.anatomy import Tick, forward, frozen, heads, layers
from kvcompile.profile.curves import budget_grid
from kvcompile.profile.fisher import BACKWARD_TICKS, recent_curves
from kvcompile.profile.probes import Probe, scaled, score
from kvcompile.profile.scores import baklava, watching
from kvcompile.profile.store import Sums, load, save

Progress = Callable[[int, int], None]
"""Called with the work done and the work in all, in tokens x layers; what it raises stops the profile."""


@dataclass(frozen=True)
class Profiled:
    """A profile and how it came about: windows that gave curves, probes asked, and probes answered rightly (where none
    is, the scores of `surfacelogic` come from all of them)."""

    profile: Profile
    curve_windows: int
    probes: int
    answered: int


def measure(
    model: Any,
    windows: Sequence[NDArray[np.int64]],
    probes: Sequence[Probe],
    *,
    seed: int,
    sink: int = DEFAULT_SINK,
    progress: Progress | None = None,
    store: Path | None = None,
) -> Profiled:
    """Profile a transformers causal LM on token ids (i64 [n] each) and retrieval probes.

    The windows of the greatest length give the loss curves; all of them, each with the same weight, the cosine scores.
    With `store`, a folder for this profile alone (`profile_key` names it), finished items are kept there: a second call
    skips them and ends with the same bits. Raises CalibrationError where the windows are too short, ModelError where
    the model's numbers are not finite.
    """
    window = max((len(ids) for ids in windows), default=0)
    least = 2 * (sink + 1)
    if window < least:
        raise CalibrationError(
            f"the longest calibration window has {window} tokens, and a profile with {sink} sinks needs at "
            f"least {least}: give it more text"
        )
    budgets = budget_grid(window, sink)
    sums = _fresh(model, len(budgets))
    if store is not None:
        sums = load(store, sums)

    work = [len(ids) * (1 + BACKWARD_TICKS * (len(ids) == window)) for ids in windows]
    work += [len(probe.prompt_ids) + len(probe.answer_ids) - 1 for probe in probes]
    work = [tokens * len(layers(model)) for tokens in work]
    done = sum(work[: int(sums["items"])])

    def tick(units: int) -> None:
        nonlocal done
        done += units
        if progress is not None:
            progress(done, sum(work))

    with frozen(model):
        for item in range(int(sums["items"]), len(work)):
            if item < len(windows):
                curve = budgets if len(windows[item]) == window else None
                _add_window(sums, model, windows[item], curve, sink, (seed, item), tick)
            else:
                _add_probe(sums, model, probes[item - len(windows)], tick)
            sums["items"] += 1
            if store is not None:
                save(store, sums)
    return _profiled(sums, model, budgets, len(windows), len(probes))


def _fresh(model: Any, points: int) -> Sums:
    """Sums over finished items; `infsc` is over all probes, `infsc_answered` over those answered rightly."""
    num_layers = len(layers(model))
    num_heads, num_kv_heads = heads(model)
    return {
        "items": np.zeros((), np.int64),
        "curve_windows": np.zeros((), np.int64),
        "answered": np.zeros((), np.int64),
        "value_cosine": np.zeros((num_layers, num_heads)),
        "residual_cosine": np.zeros(num_layers),
        "recent_loss": np.zeros((num_layers, num_kv_heads, points)),
        "infsc": np.zeros((num_layers, num_kv_heads)),
        "infsc_answered": np.zeros((num_layers, num_kv_heads)),
    }


def _add_window(
    sums: Sums,
    model: Any,
    ids: NDArray[np.int64],
    budgets: NDArray[np.int32] | None,
    sink: int,
    seed: tuple[int, int],
    tick: Tick,
) -> None:
    with watching(model) as cosines:
        trace = forward(model, ids, tick)
    sums["value_cosine"] += cosines.value
    sums["residual_cosine"] += cosines.residual
    if budgets is not None:
        sums["recent_loss"] += recent_curves(model, trace, budgets, sink=sink, seed=seed, tick=tick)
        sums["curve_windows"] += 1


def _add_probe(sums: Sums, model: Any, probe: Probe, tick: Tick) -> None:
    result = score(model, probe, tick)
    sums["infsc"] += result.infsc
    if result.answered:
        sums["infsc_answered"] += result.infsc
        sums["answered"] += 1


def _profiled(sums: Sums, model: Any, budgets: NDArray[np.int32], windows: int, probes: int) -> Profiled:
    _, num_kv_heads = heads(model)
    residual = sums["residual_cosine"] / windows
    answered = int(sums["answered"])
    profile = Profile(
        window=int(budgets[-1]),
        tokens=budgets,
        recent_loss=(sums["recent_loss"] / sums["curve_windows"]).astype(np.float32),
        baklava=baklava(sums["value_cosine"] / windows, residual, num_kv_heads).astype(np.float32),
        squeeze=residual.astype(np.float32),
        # Sums serve as well as means: the scores are stretched to [0, 1].
        surfacelogic=scaled(sums["infsc_answered" if answered else "infsc"]).astype(np.float32),
    )
    measured = (profile.recent_loss, profile.baklava, profile.squeeze, profile.surfacelogic)
    if not all(np.isfinite(array).all() for array in measured):
        raise ModelError("profiling met numbers that are not finite: load the model in float32 or bfloat16")
    return Profiled(profile, int(sums["curve_windows"]), probes, answered)
