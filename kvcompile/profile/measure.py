"""The whole profile of a model: three times through its layers.

1. Up, layer by layer. Episodes with a replay give utilities, for the scorer, and moments, for the quantiser (`Fit`);
   probes give SurfaceLogicKV's score (`Probes`); other episodes, with quotes, leave their keys and values (`Curves`).
2. Down, last layer first: the gradients of those episodes give losses under the fitted scorer and quantiser.
3. Up again: whole plans are run for real, and what they cost is compared with what the curves said (`Check`).

All sequences go through one layer before the next is looked at, so that a layer's weights are needed three times (four
times where later layers attend to the keys and values of earlier ones).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import Quantiser, Scorer
from kvcompile.artifacts.errors import CalibrationError
from kvcompile.models.allocator import kept
from kvcompile.models.room import Room
from kvcompile.profile.attention import attended
from kvcompile.profile.calls import Calls
from kvcompile.profile.check import Check, agreement, first_episodes
from kvcompile.profile.curves import Curves
from kvcompile.profile.eviction import budget_grid
from kvcompile.profile.fit import Fit
from kvcompile.profile.fitting import Fitted
from kvcompile.profile.held import UNLIMITED, Held
from kvcompile.profile.job import Item, Progress, run
from kvcompile.profile.lanes import opening
from kvcompile.profile.moments import require_finite
from kvcompile.profile.ranks import ranks
from kvcompile.profile.result import profile_of
from kvcompile.profile.resume import Sums
from kvcompile.profile.retrieval import Probes
from kvcompile.profile.rotation import read_rotary
from kvcompile.profile.setting import Material, Setting
from kvcompile.profile.structure import device_of, frozen, layers, lends
from kvcompile.stages import DEFAULT_SINK, Parts, Profile, Rotary

STATES = "states"
"""The folder, in a profile's own, of what is held between its passes."""


@dataclass(frozen=True)
class Profiled:
    """A profile, the scorer and the quantiser it is for, keys at the positions of the window, and how it came about:
    probes asked and answered rightly (where none is, the scores of `surfacelogic` come from all), and the predicted and
    measured KL of plans."""

    profile: Profile
    scorer: Scorer
    quantiser: Quantiser
    probes: int
    answered: int
    checks: tuple[tuple[float, float], ...]

    def for_context(self, rotary: Rotary) -> Profiled:
        """The same, for sequences in which the model has this rotary embedding."""
        assert self.profile.keys is not None
        return replace(self, profile=replace(self.profile, keys=replace(self.profile.keys, rotary=rotary)))

    @property
    def parts(self) -> Parts:
        """What goes into an artifact."""
        return Parts(self.profile, self.scorer, self.quantiser)

    def describe(self) -> dict[str, Any]:
        """What an artifact says of its profile, as a JSON object."""
        checked = [list(pair) for pair in self.checks]
        return {"probes_answered": self.answered, "checked_plans": checked, "values": "fitted"}


def measure(
    model: Any,
    material: Material,
    *,
    seed: int,
    sink: int = DEFAULT_SINK,
    progress: Progress | None = None,
    store: Path | None = None,
    rotary: Rotary | None = None,
    room: Room = UNLIMITED,
    waiting: Callable[[], None] | None = None,
) -> Profiled:
    """Profile a transformers causal LM.

    With `store`, a folder for this profile alone (`profile_key` names it), finished items are kept there: a second call
    skips them and ends with the same bits; one at the same time, in another process, calls its `waiting` and waits for
    the end of this one. What is held between the passes takes `room` at most, and is on disk beyond.
    `rotary` is the model's rotary embedding in contexts of the longest length, where it is known already.

    Raises:
        CalibrationError: the contexts are too short.
        ModelError: the model's numbers are not finite, or a disk is full.
    """
    window = max((len(episode.context) for episode in material.measure), default=0)
    least = 2 * (sink + 1)
    if window < least or not material.fit:
        raise CalibrationError(
            f"the longest calibration context has {window} tokens, and a profile with {sink} sinks needs at "
            f"least {least}: give it more text"
        )
    rotary = rotary or read_rotary(model, window)
    setting = Setting(model, material, seed, sink, budget_grid(window, sink), rotary, Calls(model), ranks())
    fit, probes = Fit(setting), Probes(setting)
    curves = Curves(setting, fit, kept=frozenset(first_episodes(setting)))
    check = Check(setting, fit, curves)
    fresh = {name: table for stage in (fit, probes, curves, check) for name, table in stage.fresh().items()}
    own = STATES if setting.ranks.count == 1 else f"{STATES}-{setting.ranks.count}-{setting.ranks.rank}"
    held = Held(None if store is None else store / own, room, device_of(model))
    with frozen(model), attended(model), _settled(), kept() if room.ample else nullcontext():
        items = list(_items(setting, fit, probes, curves, check))
        sums = run(items, fresh, held, progress, store, setting.ranks, waiting)
    return _profiled(sums, setting, fit.result(sums))


@contextmanager
def _settled() -> Iterator[None]:
    """Within, Python's garbage collector passes over what is there already, modules by the thousand: a profile makes so
    many small objects that it would look through all of that again and again."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _items(setting: Setting, fit: Fit, probes: Probes, curves: Curves, check: Check) -> Iterator[Item]:
    """Everything there is to do, in order."""
    top = len(layers(setting.model))
    episodes = [lane for reading in (*fit.readings, *curves.readings) for lane in reading.lanes]
    yield from opening(setting, [*episodes, *probes.lanes])
    # What later layers make of a layer's keys and values has a part in its scorer: then all are read once more.
    sharing = any(lends(setting.model, layer) for layer in range(top))
    for stages in [(fit, probes), (curves,)] if sharing else [(fit, probes, curves)]:
        for layer in range(top):
            for stage in stages:
                yield from stage.at(layer)
    yield from probes.answers()
    yield from curves.gradients()
    for layer in reversed(range(top)):
        yield from curves.back(layer)
    for layer in range(top):
        yield from check.at(layer)
    yield from check.verdicts()


def _profiled(sums: Sums, setting: Setting, fitted: Fitted) -> Profiled:
    factor, correlation = agreement(sums["checks"])
    # In float32, as an artifact holds them, so that solving from one gives the same plan.
    profile = replace(
        profile_of(sums, setting),
        factor=float(np.float32(factor)),
        correlation=float(np.float32(correlation)),
        keys=fitted.keys,
        checks=sums["checks"].astype(np.float32),
    )
    tables = ("loss", "key_loss", "value_loss", "baklava", "squeeze", "surfacelogic")
    measured: list[NDArray[Any]] = [getattr(profile, name) for name in tables]
    for part in (profile.kept, fitted.scorer, fitted.quantiser):
        measured += vars(part).values()
    require_finite(measured)
    checks = tuple((float(predicted), float(real)) for predicted, real in sums["checks"])
    probes, answered = len(setting.material.probes), int(sums["answered"].sum())
    return Profiled(profile, fitted.scorer, fitted.quantiser, probes, answered, checks)
