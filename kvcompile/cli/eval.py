"""`kvcompile eval`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import click

from kvcompile.artifacts import Artifact, check_identity, fetch, identify
from kvcompile.assemble import RECORDED
from kvcompile.cli import output, progress, tables
from kvcompile.evaluation.methods import METHODS, contenders
from kvcompile.evaluation.plot import check_plot, plot
from kvcompile.evaluation.summary import summarise
from kvcompile.problem import check_out

SEED = 1_000_003
"""Added to the seed, so that hidden facts and their places are others than in the calibration of that seed."""


@click.command("eval", short_help="measure quality at several budgets, beside other methods")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option(
    "--data", metavar="PATH", help="Text to measure on: a file, a folder or JSONL.  [default: held-out texts]"
)
@click.option("--mem", default="10%,25%,50%", show_default=True, metavar="SIZES", help="Budgets, separated by commas.")
@click.option(
    "--allocators", default="optimal,uniform,baklava,squeeze,surfacelogic,pyramid,duo,snapkv", show_default=True,
    metavar="NAMES", help=f"Methods to compare: some of {', '.join(METHODS)}.",
)  # fmt: skip
@click.option(
    "--context", type=click.IntRange(16), help="Tokens in a context.  [default: the artifact's, at most 4096]"
)
@click.option("--episodes", type=click.IntRange(1), default=5, show_default=True, help="Contexts to measure on.")
@click.option("--model", metavar="NAME", help="Where to load the model from.  [default: as the artifact says]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of passages and questions.")
@click.option("--json", "json_out", metavar="FILE", help="Write everything measured as JSON.")
@click.option("--plot", "plot_out", metavar="FILE", help="Draw quality over bytes (png, svg, pdf).")
def command(
    artifact: str, data: str | None, mem: str, allocators: str, context: int | None, episodes: int, model: str | None,
    seed: int, json_out: str | None, plot_out: str | None,
) -> None:  # fmt: skip
    """Measure a model's quality inside a budget, beside the full cache and other methods at equal bytes.

    A context is read and its cache compressed. Only then is the model asked to continue the text, to quote from it and
    to answer questions about it. Allocators are solved from the curves in the artifact; fp8, turboquant4 and
    turboquant3 store every head so; kvzip, which reads contexts twice and evicts by masks alone, is an upper reference.
    """
    plan = fetch(artifact)
    length = context or min(plan.target.context, 4096)
    plans = contenders(plan, _names(allocators), _names(mem), length)
    for out in (json_out, plot_out):
        check_out(out)
    if plot_out is not None:
        check_plot(Path(plot_out))

    import torch

    from kvcompile.calibration import draw_episodes
    from kvcompile.evaluation.held_out import described, evaluation_families
    from kvcompile.evaluation.run import evaluate
    from kvcompile.models import fast_dtype, load

    with output.quiet_transformers():
        with progress.waiting(f"loading {plan.model.name}"):
            loaded = load(model or plan.model.name, dtype=fast_dtype(getattr(torch, plan.model.dtype)))
        check_identity(plan.model, identify(loaded.model, plan.model.name))
        path = None if data is None else Path(data)
        families = evaluation_families(loaded.tokenizer, length, path)
        texts = described(families, path)
        drawn = draw_episodes(loaded.tokenizer, families, length, episodes, seed + SEED, replay=False)
        with progress.stages() as report:
            rows = evaluate(loaded.model, drawn, plans, lambda done, total: report("measuring", done, total))
    summaries = summarise(rows)
    if json_out is not None:
        found = {
            **_setting(plan, length, episodes, seed),
            "families": [family.name for family in families],
            "texts": texts,
            "plans": [dataclasses.asdict(one) for one in summaries],
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        output.write_text(Path(json_out), json.dumps(found, indent=1) + "\n")
    if plot_out is not None:
        plot(summaries, Path(plot_out), f"{plan.model.name}, contexts of {length} tokens")
    title = f"{plan.model.name}, {episodes} contexts of {length} tokens; {texts}"
    output.wide().print(tables.quality(summaries, title))


def _setting(plan: Artifact, context: int, episodes: int, seed: int) -> dict[str, Any]:
    return {
        "model": plan.model.name, "fingerprint": plan.model.fingerprint, "context": context, "episodes": episodes,
        "seed": seed, "dtype": plan.target.dtype, "scorer_bytes": plan.bytes.scorer,
        "versions": {name: importlib.metadata.version(name) for name in RECORDED},
    }  # fmt: skip


def _names(text: str) -> list[str]:
    """The parts of a list with commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
