"""The whole profile of a model, item by item, summed in float64 and resumable after each.

1. Fit: episodes with a replay give utilities, for the scorer, and moments, for the quantiser.
2. Probes give SurfaceLogicKV's score.
3. Curves: other episodes, with quotes, give losses under the fitted scorer and quantiser.
4. Check: whole plans are run for real, and what they cost is compared with what the curves said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import Quantiser, Scorer
from kvcompile.artifacts.errors import CalibrationError, ModelError
from kvcompile.profile.attention import Attention
from kvcompile.profile.check import CHECKS, agreement, sample_plan
from kvcompile.profile.context import Context, FollowUp, follow, over_context, pack, read_and_compare, read_context
from kvcompile.profile.curves import BITS, SHARES, Stored, budget_grid, keep_table, losses
from kvcompile.profile.fisher import BACKWARD_TICKS, backward, head_gradient
from kvcompile.profile.moments import MOMENTS, Moments, keys_of, moments, quantiser
from kvcompile.profile.quantised import matrices, rounded
from kvcompile.profile.resume import Sums, load, save
from kvcompile.profile.retrieval import Probe, scaled, score
from kvcompile.profile.rotation import read_rotary
from kvcompile.profile.scores import baklava
from kvcompile.profile.simulate import divergence, reference
from kvcompile.profile.structure import frozen, heads, layers
from kvcompile.profile.utility import fit, normal_sums, scores, utilities
from kvcompile.quantiser import Positions
from kvcompile.stages import DEFAULT_SINK, KeyMoments, Parts, Profile, Rotary

RETRIEVAL = "retrieval"
"""The family of all episodes' questions; the other families are those of the texts."""

Progress = Callable[[int, int], None]
"""Called with the work done and the work in all, in tokens x layers; what it raises stops the profile."""


class Episode(Protocol):
    """A context and what comes after it; `kvcompile.calibration.episodes` describes them."""

    @property
    def family(self) -> str: ...
    @property
    def context(self) -> NDArray[np.int64]: ...
    @property
    def follow_ups(self) -> Sequence[FollowUp]: ...
    @property
    def replayed(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Material:
    """What to profile on: episodes with a replay, to fit on; others to measure on; retrieval probes."""

    fit: Sequence[Episode]
    measure: Sequence[Episode]
    probes: Sequence[Probe]


@dataclass(frozen=True)
class Profiled:
    """A profile, the scorer and the quantiser it is for, keys at the positions of the window, and how it came about:
    probes asked and answered rightly
    (where none is, the scores of `surfacelogic` come from all), and the predicted and measured KL of plans."""

    profile: Profile
    scorer: Scorer
    quantiser: Quantiser
    probes: int
    answered: int
    checks: list[tuple[float, float]]

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
        return {"probes_answered": self.answered, "checked_plans": [list(pair) for pair in self.checks]}


def measure(
    model: Any,
    material: Material,
    *,
    seed: int,
    sink: int = DEFAULT_SINK,
    progress: Progress | None = None,
    store: Path | None = None,
) -> Profiled:
    """Profile a transformers causal LM.

    With `store`, a folder for this profile alone (`profile_key` names it), finished items are kept there: a second call
    skips them and ends with the same bits. Raises CalibrationError where the contexts are too short, ModelError where
    the model's numbers are not finite.
    """
    window = max((len(episode.context) for episode in material.measure), default=0)
    least = 2 * (sink + 1)
    if window < least or not material.fit:
        raise CalibrationError(
            f"the longest calibration context has {window} tokens, and a profile with {sink} sinks needs at "
            f"least {least}: give it more text"
        )
    job = _Job(model, material, seed, sink, budget_grid(window, sink), progress)
    sums = job.fresh()
    if store is not None:
        sums = load(store, sums)
    job.done = sum(job.work[: int(sums["items"])])
    with frozen(model):
        for item in range(int(sums["items"]), len(job.work)):
            job.add(sums, item)
            sums["items"] += 1
            if store is not None:
                save(store, sums)
    return job.result(sums)


class _Job:
    """The items of a profile in order, and what each adds to the sums."""

    def __init__(
        self,
        model: Any,
        material: Material,
        seed: int,
        sink: int,
        budgets: NDArray[np.int32],
        progress: Progress | None,
    ) -> None:
        self.model, self.material, self.seed, self.sink, self.budgets = model, material, seed, sink, budgets
        self.progress = progress
        texts = dict.fromkeys(episode.family for episode in material.measure)
        self.families = (*texts, RETRIEVAL)
        # An episode of each family, and the numbers of the plans that are run for real on it.
        self.checked = [
            (episode, range(i, CHECKS, len(texts))) for i, episode in enumerate(_one_each(material.measure))
        ]
        read = [(_tokens(e), BACKWARD_TICKS * _asked(e)) for e in material.measure]
        work = [_tokens(e) for e in material.fit]
        work += [len(p.prompt_ids) + len(p.answer_ids) - 1 for p in material.probes]
        work += [tokens + extra for tokens, extra in read]
        work += [_tokens(e) + len(plans) * _asked(e) for e, plans in self.checked]
        self.work = [tokens * len(layers(model)) for tokens in work]
        self.done = 0
        self.rotary = read_rotary(model, int(budgets[-1]))
        self.fitted: tuple[Scorer, Quantiser, KeyMoments] | None = None

    def fresh(self) -> Sums:
        """Sums over finished items; `infsc` is over all probes, `infsc_answered` over those answered rightly; `weight`
        counts what each family's losses sum over."""
        num_layers = len(layers(self.model))
        num_heads, num_kv_heads = heads(self.model)
        config = self.model.config.get_text_config()
        width = config.hidden_size + 1
        dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        table = (num_layers, num_kv_heads)
        losses_of = (len(self.families), *table)
        rank = {"tokens": (), "weight": (num_kv_heads,), "first": (num_kv_heads, dim)}
        second = (num_kv_heads, dim, dim)
        return {
            "items": np.zeros((), np.int64),
            "answered": np.zeros((), np.int64),
            "squares": np.zeros((num_layers, width, width), np.float32),
            "products": np.zeros((num_layers, width, num_kv_heads), np.float32),
            **{name: np.zeros((num_layers, *rank.get(name.rsplit("_")[-1], second))) for name in MOMENTS},
            "value_cosine": np.zeros((num_layers, num_heads)),
            "residual_cosine": np.zeros(num_layers),
            "infsc": np.zeros(table),
            "infsc_answered": np.zeros(table),
            "weight": np.zeros(len(self.families)),
            "loss": np.zeros((*losses_of, len(SHARES), len(self.budgets))),
            "key_loss": np.zeros((*losses_of, len(BITS))),
            "value_loss": np.zeros((*losses_of, len(BITS))),
            "checks": np.zeros((CHECKS, 2)),
        }

    def tick(self, units: int) -> None:
        self.done += units
        if self.progress is not None:
            self.progress(self.done, sum(self.work))

    def add(self, sums: Sums, item: int) -> None:
        stages = (
            (self.material.fit, self.add_fit),
            (self.material.probes, self.add_probe),
            (self.material.measure, self.add_curves),
            (self.checked, self.add_check),
        )
        for things, add in stages:
            if item < len(things):
                add(sums, item)
                return
            item -= len(things)

    def add_fit(self, sums: Sums, number: int) -> None:
        episode = self.material.fit[number]
        context, cosines = read_and_compare(self.model, episode.context, self.tick)
        sums["value_cosine"] += cosines.value
        sums["residual_cosine"] += cosines.residual
        packed = pack(len(context), episode.follow_ups)
        attend = over_context(context, packed)

        def watch(call: Attention) -> Tensor:
            worth = utilities(call, context, packed)
            square, product = normal_sums(context.hidden[call.layer], worth, episode.replayed, self.sink)
            sums["squares"][call.layer] += square
            sums["products"][call.layer] += product
            projection = layers(self.model)[call.layer].get_parameter("self_attn.o_proj.weight")
            for name, value in vars(moments(call, context, packed, projection, self.rotary)).items():
                sums[name][call.layer] += value
            return attend(call)

        follow(self.model, packed, watch, self.tick)

    def add_probe(self, sums: Sums, number: int) -> None:
        result = score(self.model, self.material.probes[number], self.tick)
        sums["infsc"] += result.infsc
        if result.answered:
            sums["infsc_answered"] += result.infsc
            sums["answered"] += 1

    def add_curves(self, sums: Sums, number: int) -> None:
        episode = self.material.measure[number]
        scorer, narrow, _ = self.compiled(sums)
        context = read_context(self.model, episode.context, self.tick)
        packed = pack(len(context), episode.follow_ups)
        attend = over_context(context, packed)
        trace = follow(self.model, packed, attend, self.tick)
        gradient = head_gradient(self.model, trace.final, (self.seed, number))
        for block in packed.blocks:
            gradient[block.start : block.judged] = 0
        text, questions = self.families.index(episode.family), len(self.families) - 1
        # Budgets are shares of the window: a shorter context is cut in proportion.
        budgets = np.maximum(self.budgets * (len(context) / self.budgets[-1]), self.sink + 1).round().astype(np.int32)

        def visit(call: Attention, upstream: Tensor) -> None:
            if call.window is not None and call.window < len(context):
                return
            kept = keep_table(scores(scorer, call.layer, context.hidden[call.layer]), budgets, self.sink)
            stored = Stored(*(_stored(context, narrow, call.layer, kind) for kind in ("key", "value")))
            found = losses(call, upstream, context, packed, kept, stored)
            for name, tables in (("loss", found.evicted), ("key_loss", found.keys), ("value_loss", found.values)):
                sums[name][text, call.layer] += (tables["continuation"] + tables["quote"]) / 2
                sums[name][questions, call.layer] += tables["question"]

        backward(self.model, trace, gradient, visit, self.tick, attend)
        sums["weight"][[text, questions]] += 1

    def add_check(self, sums: Sums, number: int) -> None:
        episode, plans = self.checked[number]
        scorer, narrow, _ = self.compiled(sums)
        profile = self.profile(sums)
        families = [self.families.index(episode.family), len(self.families) - 1]
        context = read_context(self.model, episode.context, self.tick)
        known = reference(self.model, context, pack(len(context), episode.follow_ups), self.tick)
        for i in plans:
            plan = sample_plan(profile, i, self.seed, self.sink)
            found = divergence(self.model, known, plan.plan, scorer, narrow, profile.window, self.tick)
            text = (found["continuation"] + found["quote"]) / 2
            sums["checks"][i] = plan.losses[families].mean(), (text + found["question"]) / 2

    def compiled(self, sums: Sums) -> tuple[Scorer, Quantiser, KeyMoments]:
        """The scorer, the quantiser for the window's positions and what it is made from, once all episodes to fit on
        are in the sums."""
        if self.fitted is None:
            by_layer = [Moments(*(sums[name][i] for name in MOMENTS)) for i in range(len(sums["squares"]))]
            keys = keys_of(by_layer, self.rotary)
            window = (Positions(0, int(self.budgets[-1])),) * len(by_layer)
            self.fitted = fit(sums["squares"], sums["products"]), quantiser(by_layer, keys, window), keys
        return self.fitted

    def profile(self, sums: Sums) -> Profile:
        _, num_kv_heads = heads(self.model)
        residual = sums["residual_cosine"] / len(self.material.fit)
        value = sums["value_cosine"] / len(self.material.fit)
        each = np.maximum(sums["weight"], 1).reshape(-1, 1, 1, 1)
        return Profile(
            families=self.families,
            window=int(self.budgets[-1]),
            tokens=self.budgets,
            shares=np.array(SHARES, np.float32),
            loss=(sums["loss"] / each[..., None]).astype(np.float32),
            bits=np.array(BITS, np.int32),
            key_loss=(sums["key_loss"] / each).astype(np.float32),
            value_loss=(sums["value_loss"] / each).astype(np.float32),
            factor=1.0,
            correlation=float("nan"),
            baklava=baklava(value, residual, num_kv_heads).astype(np.float32),
            squeeze=residual.astype(np.float32),
            # Sums serve as well as means: the scores are stretched to [0, 1].
            surfacelogic=scaled(sums["infsc_answered" if int(sums["answered"]) else "infsc"]).astype(np.float32),
        )

    def result(self, sums: Sums) -> Profiled:
        profile = self.profile(sums)
        factor, correlation = agreement(sums["checks"])
        # As an artifact holds them, so that solving from one gives the same plan.
        profile = replace(profile, factor=float(np.float32(factor)), correlation=float(np.float32(correlation)))
        scorer, narrow, keys = self.compiled(sums)
        tables = ("loss", "key_loss", "value_loss", "baklava", "squeeze", "surfacelogic")
        measured: list[NDArray[Any]] = [getattr(profile, name) for name in tables]
        measured += [*vars(scorer).values(), *vars(narrow).values()]
        if not all(np.isfinite(array).all() for array in measured):
            raise ModelError("profiling met numbers that are not finite: load the model in float32 or bfloat16")
        checks = [(float(predicted), float(real)) for predicted, real in sums["checks"]]
        return Profiled(
            replace(profile, keys=keys), scorer, narrow, len(self.material.probes), int(sums["answered"]), checks
        )


def _stored(context: Context, narrow: Quantiser, layer: int, kind: str) -> tuple[Tensor, ...]:
    stored = (context.keys if kind == "key" else context.values)[layer]
    transform, mean = matrices(narrow, layer, kind, stored.device)
    return tuple(rounded(stored, transform, mean, bits) for bits in BITS)


def _one_each(episodes: Sequence[Episode]) -> list[Episode]:
    """The first episode of every family."""
    first: dict[str, Episode] = {}
    for episode in episodes:
        first.setdefault(episode.family, episode)
    return list(first.values())


def _asked(episode: Episode) -> int:
    return sum(len(one.ids) for one in episode.follow_ups)


def _tokens(episode: Episode) -> int:
    return len(episode.context) + _asked(episode)
