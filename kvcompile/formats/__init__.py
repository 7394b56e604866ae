"""Files of other systems, both ways; a new one is a file here and a line below."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcompile.allocators.foreign import Foreign
from kvcompile.artifacts import Artifact, ExchangeError
from kvcompile.artifacts.serialize import replace_file
from kvcompile.assemble import stored_parts
from kvcompile.formats import common, duoattention, headkv, lukv, tangram, windows
from kvcompile.problem import Options, pose_with, unmeasured
from kvcompile.stages import Parts, Plan, Problem


@dataclass(frozen=True)
class Format:
    """`contents` gives an artifact's files by name, `read` what such a file says. `folder`: it has several files.
    `lost` says what it has no words for, and `runs` which token policy the other system's own stands nearest to."""

    contents: Callable[[Artifact], dict[str, bytes]]
    read: Callable[[Path], Foreign]
    folder: bool
    lost: str
    runs: str


FORMATS = {
    "duoattention": Format(
        duoattention.contents, duoattention.read, True,
        "a head is full or streaming: budgets between, scored tokens and widths are lost", "recent",
    ),
    "lukv": Format(
        lukv.contents, lukv.read, False,
        "tokens a head at 99 levels: policies and widths are lost, and the scorer is the reader's own", "scored",
    ),
    "headkv": Format(
        headkv.contents, headkv.read, False,
        "a score a head, for its reader to divide tokens by: policies, sinks, rings and widths are lost", "scored",
    ),
    "tangram": Format(
        tangram.contents, tangram.read, False,
        "clusters of heads that share what the largest takes: policies, sinks, rings and widths are lost", "scored",
    ),
    "windows": Format(
        windows.contents, windows.read, False,
        "one window for all heads of a layer: budgets of heads, scored tokens and widths are lost", "recent",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Export:
    """Files by name, and what became of the plan: `lost` says what the files have no words for, None where reading them
    gives the artifact's own budgets; `plan` is what they give for the bytes of the artifact, and `loss` its predicted
    loss in nats a token, NaN where the artifact has no curves."""

    files: dict[str, bytes]
    lost: str | None
    plan: Plan
    loss: float


def export(artifact: Artifact, name: str) -> Export:
    """An artifact's plan for another system, and what is left of it when that system reads it.

    Raises:
        ExchangeError: an unknown format.
        ArtifactError: a format that needs curves, and an artifact without.
    """
    if name not in FORMATS:
        raise ExchangeError(f"there is no format {name!r}: expected one of {', '.join(FORMATS)}")
    format = FORMATS[name]
    files = format.contents(artifact)
    with tempfile.TemporaryDirectory() as folder:
        for file, data in files.items():
            (Path(folder) / file).write_bytes(data)
        foreign = format.read(Path(folder) if format.folder else Path(folder) / next(iter(files)))
    measured = bool(artifact.profile)
    plan = foreign(_problem(artifact, format.runs, measured))
    same = all(
        np.array_equal(getattr(plan, field), getattr(artifact.budgets, field))
        for field in ("policy", "capacity", "sink", "recent", "k_bits", "v_bits")
    )
    return Export(files, None if same else format.lost, plan, plan.loss if measured else math.nan)


def _problem(artifact: Artifact, policy: str, measured: bool) -> Problem:
    """The artifact's own bytes, to be divided anew in elements of the cache's own type."""
    target = dataclasses.replace(artifact.target, bytes=artifact.bytes.resident)
    parts = stored_parts(artifact) if measured else Parts(unmeasured(artifact.model, target.context), None, None)
    scored = policy == "scored" and artifact.scorer is not None and bool((parts.profile.shares < 1).any())
    options = Options(target.context, target.batch, "uniform", "scored" if scored else "recent", target.dtype)
    return pose_with(artifact.model, parts, target, options)


def read(path: Path) -> Foreign:
    """What a file, or a folder of DuoAttention's, says of heads.

    Raises:
        ExchangeError: a file that is of no known kind, or malformed.
    """
    if path.is_dir() or path.suffix == ".tsv":
        return duoattention.read(path)
    if path.suffix == ".npy":
        return lukv.read(path)
    if path.suffix == ".npz":
        return tangram.read(path)
    if path.suffix == ".json":
        return windows.read(path) if "max_attention_window" in common.parsed(path, common.whole) else headkv.read(path)
    raise ExchangeError(
        f"{path} is of no known kind: expected a folder of DuoAttention's, or .tsv, .npy, .npz or .json"
    )


def write(files: dict[str, bytes], format: Format, out: Path) -> None:
    """Put the files in place: into the folder `out`, or as the file `out`.

    Raises:
        ExchangeError: a place that cannot be written.
    """
    try:
        if format.folder:
            out.mkdir(exist_ok=True)
        for name, data in files.items():
            replace_file(out / name if format.folder else out, data)
    except OSError as error:
        raise ExchangeError(f"{out} cannot be written: {error.strerror or error}") from None
