"""`kvcompile eval`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from kvcompile.artifacts import Artifact, check_identity, fetch, identify
from kvcompile.assemble import RECORDED
from kvcompile.cli import display
from kvcompile.evaluation.methods import METHODS, contenders
from kvcompile.evaluation.plot import check_plot, plot
from kvcompile.evaluation.summary import Summary, summarise
from kvcompile.problem import check_out

SEED = 1_000_003
"""Added to the seed, so that no passage is one that calibration saw for that seed."""


@click.command("eval", short_help="measure quality at several budgets, beside other methods")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option("--data", metavar="PATH", help="Text to measure on: a file, a folder, jsonl.  [default: our families]")
@click.option("--mem", default="10%,25%,50%", show_default=True, metavar="SIZES", help="Budgets, parted by commas.")
@click.option(
    "--allocators", default="optimal,uniform,baklava,squeeze,surfacelogic,pyramid,duo,snapkv", show_default=True,
    metavar="NAMES", help=f"Some of {', '.join(METHODS)}.",
)  # fmt: skip
@click.option("--context", type=click.IntRange(16), help="Tokens of a context.  [default: the plan's, at most 4096]")
@click.option("--episodes", type=click.IntRange(1), default=5, show_default=True, help="Contexts to measure on.")
@click.option("--model", metavar="NAME", help="Where the model is, if not where it was.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "json_out", metavar="FILE", help="Write everything measured as JSON.")
@click.option("--plot", "plot_out", metavar="FILE", help="Draw quality over bytes (png, svg, pdf).")
def command(
    artifact: str, data: str | None, mem: str, allocators: str, context: int | None, episodes: int, model: str | None,
    seed: int, json_out: str | None, plot_out: str | None,
) -> None:  # fmt: skip
    """Measure what is left of a model's quality inside a budget: the loss of text that goes on, of quotes from the
    context and of answers to questions about it, all asked only after the context was compressed; beside the full cache
    and other methods with the same bytes, solved from the artifact's curves."""
    plan = fetch(artifact)
    length = context or min(plan.target.context, 4096)
    plans = contenders(plan, _names(allocators), _names(mem), length)
    for out in (json_out, plot_out):
        check_out(out)
    if plot_out is not None:
        check_plot(Path(plot_out))

    import torch

    from kvcompile.calibration import draw_episodes, evaluation_families
    from kvcompile.evaluation.run import evaluate
    from kvcompile.models import fast_dtype, load

    with display.quiet_transformers():
        with display.stderr.status(f"loading {plan.model.name}"):
            loaded = load(model or plan.model.name, dtype=fast_dtype(getattr(torch, plan.model.dtype)))
        check_identity(plan.model, identify(loaded.model, plan.model.name))
        families = evaluation_families(loaded.tokenizer, length, None if data is None else Path(data))
        drawn = draw_episodes(loaded.tokenizer, families, length, episodes, seed + SEED, replay=False)
        with display.progress_bars() as report:
            rows = evaluate(loaded.model, drawn, plans, lambda done, total: report("measuring", done, total))
    summaries = summarise(rows)
    if json_out is not None:
        described = {
            **_described(plan, length, episodes, seed, [family.name for family in families]),
            "plans": [dataclasses.asdict(one) for one in summaries],
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        display.write_text(Path(json_out), json.dumps(described, indent=1) + "\n")
    if plot_out is not None:
        plot(summaries, Path(plot_out), f"{plan.model.name}, contexts of {length} tokens")
    # A pipe has no width of its own, and a table that is cut short is of no use.
    console = display.stdout if display.stdout.is_terminal else Console(width=120)
    console.print(table(summaries, f"{plan.model.name}, {episodes} contexts of {length} tokens"))


def table(summaries: list[Summary], title: str) -> Table:
    """One row a plan, the best of each budget first."""
    found = Table(title=title, title_justify="left")
    for name in ("method", "bytes", "perplexity", "KL", "quote loss", "quote KL", "answer loss", "answer KL", "exact"):
        found.add_column(name, justify="left" if name == "method" else "right")
    budget = summaries[0].budget
    for one in summaries:
        if one.budget != budget:
            found.add_section()
            budget = one.budget
        text, quote, question = (one.kinds[kind] for kind in ("continuation", "quote", "question"))
        numbers = [f"{value:.4f}" for value in (text.kl, quote.loss, quote.kl, question.loss, question.kl)]
        found.add_row(one.method, f"{one.share:.2%}", f"{text.perplexity:.3f}", *numbers, f"{question.exact:.0%}")
    return found


def _described(plan: Artifact, context: int, episodes: int, seed: int, families: list[str]) -> dict[str, Any]:
    return {
        "model": plan.model.name, "fingerprint": plan.model.fingerprint, "context": context, "episodes": episodes,
        "seed": seed, "families": families, "dtype": plan.target.dtype, "scorer_bytes": plan.bytes.scorer,
        "versions": {name: importlib.metadata.version(name) for name in RECORDED},
    }  # fmt: skip


def _names(text: str) -> list[str]:
    """The parts of a list with commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
