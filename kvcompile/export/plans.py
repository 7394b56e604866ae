"""An artifact's plan as another system's files, and what is left of it when that system reads them."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcompile.allocators import plan_bytes
from kvcompile.allocators.foreign import following
from kvcompile.artifacts import Artifact, ExchangeError, TargetError
from kvcompile.artifacts.serialize import replace_file
from kvcompile.assemble import stored_parts
from kvcompile.export.values import curves, gates, query_head_tokens, static_shares, windows
from kvcompile.formats import FORMATS, Format, Value
from kvcompile.problem import Options, pose_with, unmeasured
from kvcompile.stages import Parts, Plan, Problem


@dataclass(frozen=True)
class Exporter:
    """How a plan goes into the format of the same name: `value` says it in the format's words, `lost` what the format
    has no words for, and `runs` the token policy that the other system's own stands nearest to."""

    value: Callable[[Artifact], Value]
    lost: str
    runs: str


EXPORTS = {
    "duoattention": Exporter(
        gates, "a head is full or streaming: budgets between, scored tokens and bits are lost", "recent"
    ),
    "lukv": Exporter(
        curves, "tokens a head at 99 levels: policies and bits are lost, and the scorer is the reader's own", "scored"
    ),
    "headkv": Exporter(
        query_head_tokens,
        "a score a head, for its reader to divide tokens by: policies, sinks, rings and bits are lost",
        "scored",
    ),
    "tangram": Exporter(
        static_shares,
        "clusters of heads that share what the largest takes: policies, sinks, rings and bits are lost",
        "scored",
    ),
    "windows": Exporter(
        windows, "one window for all heads of a layer: budgets of heads, scored tokens and bits are lost", "recent"
    ),
}
"""By the name of their format in `kvcompile.formats.FORMATS`."""


def register(name: str, exporter: Exporter) -> None:
    """Add an exporter for a format that `kvcompile.formats` knows; the same one may be added again.

    Raises:
        ValueError: a name that another exporter has, or that no format has.
    """
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}: expected one of {', '.join(FORMATS)}")
    if EXPORTS.setdefault(name, exporter) != exporter:
        raise ValueError(f"there is an exporter {name!r} already: expected another name")


@dataclass(frozen=True)
class Export:
    """Files by name, and what became of the plan: `lost` says what the files have no words for, None where reading them
    gives the artifact's own budgets; `plan` is what they give for the bytes of the artifact, and `loss` its predicted
    loss in nats a token, NaN where the artifact has no curves. `format` is what they are in."""

    files: dict[str, bytes]
    lost: str | None
    plan: Plan
    loss: float
    format: Format


def export(artifact: Artifact, name: str) -> Export:
    """An artifact's plan for another system, and what is left of it when that system reads it.

    Raises:
        ExchangeError: an unknown format, or one that has no words for so small a plan.
        ArtifactError: a format that needs curves, and an artifact without.
    """
    if name not in EXPORTS:
        raise ExchangeError(f"there is no format {name!r}: expected one of {', '.join(EXPORTS)}")
    exporter, format = EXPORTS[name], FORMATS[name]
    files = format.write(exporter.value(artifact))
    with tempfile.TemporaryDirectory() as folder:
        for file, data in files.items():
            (Path(folder) / file).write_bytes(data)
        allocator = following(format.read(Path(folder) if format.folder else Path(folder) / next(iter(files))))
    problem = _problem(artifact, exporter.runs)
    try:
        plan = allocator(problem)
        fits = plan_bytes(problem, plan) <= problem.target
    except TargetError:  # its sentence is about a file that only we have seen
        fits = False
    if not fits:
        raise ExchangeError(
            f"as {name}, the plan of {artifact.model.name} takes more than its own {problem.target} bytes a sequence: "
            "export an artifact of a larger target, or to another format"
        )
    same = all(
        np.array_equal(getattr(plan, field), getattr(artifact.budgets, field))
        for field in ("policy", "capacity", "sink", "recent", "k_bits", "v_bits")
    )
    return Export(files, None if same else exporter.lost, plan, plan.loss if artifact.profile else math.nan, format)


def write(made: Export, out: Path) -> None:
    """Put the files in place: into the folder `out`, or as the file `out`.

    Raises:
        ExchangeError: a place that cannot be written.
    """
    try:
        if made.format.folder:
            out.mkdir(exist_ok=True)
        for name, data in made.files.items():
            replace_file(out / name if made.format.folder else out, data)
    except OSError as error:
        raise ExchangeError(f"{out} cannot be written: {error.strerror or error}") from None


def _problem(artifact: Artifact, policy: str) -> Problem:
    """The artifact's own bytes, to be divided anew in elements of the cache dtype."""
    target = dataclasses.replace(artifact.target, bytes=artifact.bytes.resident)
    without = Parts(unmeasured(artifact.model, target.context), None, None)
    parts = stored_parts(artifact) if artifact.profile else without
    # Without the artifact's own scorer and curves of it, a policy `scored` cannot be predicted.
    scored = policy == "scored" and artifact.scorer is not None and bool((parts.profile.shares < 1).any())
    options = Options(target.context, target.batch, "uniform", "scored" if scored else "recent", target.dtype)
    return pose_with(artifact.model, parts, target, options)
