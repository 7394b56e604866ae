"""`kvcompile eval`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kvcompile.artifacts import Artifact, CalibrationError, KvcompileError, check_identity, fetch, identify
from kvcompile.assemble import RECORDED
from kvcompile.cli import output, progress, tables
from kvcompile.evaluation.methods import METHODS, contenders
from kvcompile.evaluation.participant import Participant
from kvcompile.evaluation.plot import check_plot, plot
from kvcompile.evaluation.ruler import ALL, TASKS, Scores, Task, named
from kvcompile.evaluation.summary import Summary, summarise
from kvcompile.problem import check_out

TEXTS = "texts"
"""What `--tasks` names beside RULER's: text going on, quotes and questions."""

SEED = 1_000_003
"""Added to the seed, so that hidden facts and their places are others than in the calibration of that seed."""


@click.command("eval", short_help="measure quality at several budgets, beside other methods")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option(
    "--data", metavar="PATH",
    help="Text to measure on, or for RULER's essays: a file, a folder or JSONL.  [default: held-out texts]",
)  # fmt: skip
@click.option(
    "--tasks", default=TEXTS, show_default=True, metavar="NAMES",
    help=f"What is asked: {TEXTS} (text going on, quotes, questions), {ALL} (all of RULER's tasks), or some of "
    f"{', '.join(TASKS)}.",
)  # fmt: skip
@click.option("--mem", default="10%,25%,50%", show_default=True, metavar="SIZES", help="Budgets, separated by commas.")
@click.option(
    "--allocators", default="optimal,uniform,baklava,squeeze,surfacelogic,pyramid,duo,snapkv", show_default=True,
    metavar="NAMES", help=f"Methods to compare: some of {', '.join(METHODS)}.",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(16), help="Tokens in a context.  [default: the artifact's, at most 4096]"
)
@click.option("--episodes", type=click.IntRange(1), default=5, show_default=True, help="Contexts to measure on.")
@click.option("--questions", type=click.IntRange(1), default=20, show_default=True, help="Samples of each RULER task.")
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True,
    help="Samples of RULER that are answered side by side, which takes less time and more memory.",
)  # fmt: skip
@click.option("--model", metavar="NAME", help="Where to load the model from.  [default: as the artifact says]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of passages and questions.")
@click.option("--json", "json_out", metavar="FILE", help="Write everything measured as JSON.")
@click.option("--plot", "plot_out", metavar="FILE", help="Draw quality over bytes (png, svg, pdf).")
def command(
    artifact: str, data: str | None, tasks: str, mem: str, allocators: str, context: int | None, episodes: int,
    questions: int, batch: int, model: str | None, seed: int, json_out: str | None, plot_out: str | None,
) -> None:  # fmt: skip
    """Measure a model's quality inside a budget, beside the full cache and other methods at equal bytes.

    A context is read and its cache compressed. Only then is the model asked to continue the text, to quote from it and
    to answer questions about it, or with --tasks what RULER asks: to find needles, to follow variables, to name
    frequent words. Allocators are solved from the curves in the artifact; fp8, turboquant4 and turboquant3 store every
    head so; kvzip, which reads contexts twice and evicts by masks alone, is an upper reference.
    """
    plan = fetch(artifact)
    length = context or min(plan.target.context, 4096)
    asked = _tasks(tasks)
    if data is not None and not Path(data).exists():
        raise CalibrationError(f"there is no text at {data}: expected a file or a folder")
    plans = contenders(plan, _names(allocators), _names(mem), length)
    for out in (json_out, plot_out):
        check_out(out)
    if plot_out is not None:
        if asked is not None:
            raise KvcompileError(f"--plot draws what is measured on texts: expected --tasks {TEXTS}, or no plot")
        check_plot(Path(plot_out))

    import torch

    from kvcompile.models import fast_dtype, load

    path = None if data is None else Path(data)
    with output.quiet_transformers():
        with progress.waiting(f"loading {plan.model.name}"):
            loaded = load(model or plan.model.name, dtype=fast_dtype(getattr(torch, plan.model.dtype)))
        check_identity(plan.model, identify(loaded.model, plan.model.name))
        if asked is None:
            count = {"episodes": episodes}
            found, summaries = _texts(loaded, plans, length, episodes, seed + SEED, path)
            title = f"{plan.model.name}, {episodes} contexts of {length} tokens; {found['texts']}"
            table = tables.quality(summaries, title)
        else:
            count = {"questions": questions}
            found, scores = _ruler(loaded, plans, asked, length, questions, batch, seed, path)
            title = f"{plan.model.name}, RULER in {length} tokens, {questions} samples a task; {found['texts']}"
            table = tables.ruler(scores, title)
    if json_out is not None:
        setting = _setting(plan, length, count, seed)
        output.write_text(Path(json_out), json.dumps({**setting, **found}, indent=1) + "\n")
    if plot_out is not None:
        plot(summaries, Path(plot_out), f"{plan.model.name}, contexts of {length} tokens")
    output.wide().print(table)


def _texts(
    loaded: Any, plans: Sequence[Participant], length: int, episodes: int, seed: int, path: Path | None
) -> tuple[dict[str, Any], list[Summary]]:
    """Text going on, quotes and questions: what goes into the JSON, and a line a plan."""
    from kvcompile.calibration import draw_episodes
    from kvcompile.evaluation.held_out import described, evaluation_families
    from kvcompile.evaluation.run import evaluate

    families = evaluation_families(loaded.tokenizer, length, path)
    drawn = draw_episodes(loaded.tokenizer, families, length, episodes, seed, replay=False)
    with progress.stages() as report:
        rows = evaluate(loaded.model, drawn, plans, lambda done, total: report("measuring", done, total))
    summaries = summarise(rows)
    return {
        "families": [family.name for family in families],
        "texts": described(families, path),
        "plans": [dataclasses.asdict(one) for one in summaries],
        "rows": [dataclasses.asdict(row) for row in rows],
    }, summaries


def _ruler(
    loaded: Any, plans: Sequence[Participant], tasks: dict[str, Task], length: int, count: int, batch: int,
    seed: int, path: Path | None,
) -> tuple[dict[str, Any], list[Scores]]:  # fmt: skip
    """RULER's tasks: what goes into the JSON, and a line a plan."""
    from kvcompile.evaluation.ruler import answer, draw_samples, essay_documents, summarise_scores

    samples = draw_samples(loaded.tokenizer, tasks, length, count, seed, essay_documents(path))
    with progress.stages() as report:
        answers = answer(
            loaded.model, loaded.tokenizer, samples, plans, lambda done, total: report("answering", done, total), batch
        )
    scores = summarise_scores(answers)
    return {
        "tasks": list(tasks),
        "texts": "essays: held-out texts" if path is None else f"essays: your text: {path}",
        "plans": [dataclasses.asdict(one) for one in scores],
        "samples": [dataclasses.asdict(one) for one in answers],
    }, scores


def _tasks(text: str) -> dict[str, Task] | None:
    """RULER's tasks, or None where texts are asked for."""
    names = _names(text)
    if TEXTS in names and len(names) > 1:
        raise KvcompileError(f"{TEXTS} are measured alone: expected --tasks {TEXTS}, or RULER's tasks without it")
    return None if TEXTS in names else named(names)


def _setting(plan: Artifact, context: int, count: dict[str, int], seed: int) -> dict[str, Any]:
    return {
        "model": plan.model.name, "fingerprint": plan.model.fingerprint, "context": context, **count, "seed": seed,
        "dtype": plan.target.dtype, "scorer_bytes": plan.bytes.scorer,
        "versions": {name: importlib.metadata.version(name) for name in RECORDED},
    }  # fmt: skip


def _names(text: str) -> list[str]:
    """The parts of a list with commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
