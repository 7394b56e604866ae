"""`kvcompile build`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from kvcompile import compiler, display
from kvcompile.allocators import ALLOCATORS
from kvcompile.artifacts import Artifact, read
from kvcompile.memory import parse_memory

POLICIES = ("recent", "window", "h2o", "snapkv")


@click.command("build", short_help="profile a model, solve for a memory target, write an artifact")
@click.option("--model", metavar="NAME", help="Alias (smollm2-135m), hub id, folder or GGUF file.")
@click.option("--from", "old", metavar="FILE", help="Solve anew from this artifact's curves, without the model.")
@click.option("--mem", required=True, metavar="SIZE", help="8GB, 512MiB, or a share of the full cache such as 25%.")
@click.option("--context", type=click.IntRange(1), help="Tokens a sequence.  [default: the model's]")
@click.option("--batch", type=click.IntRange(1), help="Sequences.  [default: 1]")
@click.option("--allocator", type=click.Choice(list(ALLOCATORS)), default="optimal", show_default=True)
@click.option("--policy", type=click.Choice(POLICIES), help="Token policy.  [default: the allocator's own]")
@click.option(
    "--kv-dtype", type=click.Choice(["auto", *compiler.KV_DTYPES]), default="auto", show_default=True,
    help="Element type of the cache; auto: the model's.",
)  # fmt: skip
@click.option("--calib", metavar="PATH", help="Text to calibrate on: a file, a folder, jsonl.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", "-o", metavar="FILE", help="[default: MODEL.kvb in this folder]")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def command(
    model: str | None, old: str | None, mem: str, context: int | None, batch: int | None, allocator: str,
    policy: str | None, kv_dtype: str, calib: str | None, seed: int, out: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Profile a model, solve for per-head budgets under a memory target, and write one artifact."""
    if (model is None) == (old is None):
        raise click.UsageError("give either --model NAME or --from FILE")
    parse_memory(mem)
    source = Path(model or old or "")
    path = Path(out or f"{source.name.removesuffix('.gguf').removesuffix('.kvb') or 'artifact'}.kvb")
    compiler.check_out(path)
    options: dict[str, Any] = {
        "mem": mem, "context": context, "out": path, "allocator": allocator, "policy": policy, "kv_dtype": kv_dtype,
    }  # fmt: skip
    start = time.perf_counter()
    if old is not None:
        artifact = compiler.resolve(read(Path(old)), batch=batch, **options)
    else:
        artifact = _from_model(str(model), calib, seed, batch or 1, options)
    seconds = time.perf_counter() - start
    if as_json:
        display.print_json({"artifact": str(path), **display.summary(artifact), "seconds": seconds})
    else:
        _print(artifact, path, seconds)


def _from_model(name: str, calib: str | None, seed: int, batch: int, options: dict[str, Any]) -> Artifact:
    from kvcompile.models import load

    with display.quiet_transformers():
        with display.stderr.status(f"loading {name}"):
            loaded = load(name)
        with display.progress_bars() as report:
            return compiler.build(
                loaded.model, loaded.tokenizer, batch=batch, calib=calib, seed=seed, name=loaded.name, report=report,
                **options,
            )  # fmt: skip


def _print(artifact: Artifact, path: Path, seconds: float) -> None:
    account, solver = artifact.bytes, artifact.solver
    click.echo(f"{path}: {artifact.model.name} at {artifact.target.context} tokens, batch {artifact.target.batch}")
    click.echo(f"  target    {display.human(artifact.target.bytes)}")
    click.echo(
        f"  resident  {display.human(account.resident)}, {account.resident / account.full:.1%} of the full cache"
    )
    click.echo(f"  prefill   {display.human(account.transient)} more for one layer at a time")
    if "bound" in solver:
        click.echo(
            f"  loss      {solver['objective']:.4g} predicted, bound {solver['bound']:.4g}, gap {solver['gap']:.2g}"
        )
    click.echo(f"  time      {seconds:.1f} s")
