"""`kvcompile build`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from kvcompile import compiler
from kvcompile.allocators import ALLOCATORS, FILE
from kvcompile.artifacts import Artifact, TargetError, fetch
from kvcompile.cli import display
from kvcompile.problem import KV_DTYPES, WIDTHS, Options, check_out
from kvcompile.problem.memory import parse_memory
from kvcompile.report.summary import summary
from kvcompile.stages import PROFILE_TOKENS


class AllocatorName(click.Choice[str]):
    """A name, or `file:PATH` for a file of another system."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if str(value).startswith(FILE) else super().convert(value, param, ctx)


POLICIES = ("recent", "window", "h2o", "snapkv", "scored")


@click.command("build", short_help="profile a model, solve for a memory target, write an artifact")
@click.option("--model", metavar="NAME", help="Alias (smollm2-135m), hub id, folder or GGUF file.")
@click.option("--from", "old", metavar="FILE", help="Solve anew from this artifact's curves, without the model.")
@click.option(
    "--mem", required=True, metavar="SIZE",
    help="8GB, 512MiB, or a share of the full cache such as 25%; several, parted by commas, write a file each.",
)  # fmt: skip
@click.option("--context", type=click.IntRange(1), help="Tokens a sequence.  [default: the model's]")
@click.option("--batch", type=click.IntRange(1), help="Sequences.  [default: 1]")
@click.option(
    "--allocator", type=AllocatorName(list(ALLOCATORS)), default="optimal", show_default=True,
    help="Or file:PATH, a file of another system (see `kvcompile export`), as importance or as the plan.",
)  # fmt: skip
@click.option("--policy", type=click.Choice(POLICIES), help="Token policy.  [default: the allocator's own]")
@click.option(
    "--kv-dtype", type=click.Choice(["auto", *KV_DTYPES, *WIDTHS]), default="auto",
    show_default=True, help="Element type of the cache; auto: the model's, and 8 or 4 bits where that is better.",
)  # fmt: skip
@click.option("--classes-per-layer", type=click.IntRange(1), metavar="K", help="At most K distinct choices a layer.")
@click.option("--tp", type=click.IntRange(1), metavar="N", help="Place the heads on N tensor-parallel ranks.")
@click.option(
    "--refine", type=click.IntRange(0), default=0, metavar="N",
    help="Measure the plan and N others, and keep what measures best.",
)  # fmt: skip
@click.option("--calib", metavar="PATH", help="Text to calibrate on beside our own: a file, a folder, jsonl.")
@click.option(
    "--profile-tokens", type=click.IntRange(64), metavar="N",
    help=f"Longest context that is profiled.  [default: {PROFILE_TOKENS}]",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", "-o", metavar="FILE", help="[default: MODEL.kvb in this folder, OLD-new.kvb with --from]")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def command(
    model: str | None, old: str | None, mem: str, context: int | None, batch: int | None, allocator: str,
    policy: str | None, kv_dtype: str, classes_per_layer: int | None, tp: int | None, refine: int, calib: str | None,
    profile_tokens: int | None, seed: int, out: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Profile a model, solve for per-head budgets under a memory target, and write an artifact.

    With several targets the file of each has it in its name: x.kvb becomes x-25pct.kvb, x-2GB.kvb.
    """
    if (model is None) == (old is None):
        raise click.UsageError("give either --model NAME or --from FILE")
    if old is not None and refine:
        raise click.UsageError("--refine measures with the model: give --model NAME instead of --from FILE")
    if old is not None and profile_tokens is not None:
        raise click.UsageError("--profile-tokens profiles the model: give --model NAME instead of --from FILE")
    if refine and allocator != "optimal":
        raise click.UsageError("--refine improves the plans of --allocator optimal alone")
    source = Path(model or old or "")
    stem = source.name.removesuffix(".gguf").removesuffix(".kvb") or "artifact"
    # Without a name of its own, what is solved anew must not take its source's place.
    path = Path(out or (f"{stem}.kvb" if old is None else f"{stem}-new.kvb"))
    wanted = outputs(mem, path)
    for file in wanted.values():
        check_out(file)
    options = Options(context, batch, allocator, policy, kv_dtype, classes_per_layer, tp)
    start = time.perf_counter()
    if old is not None:
        artifact = fetch(old)
        built = [compiler.resolve(artifact, mem=text, out=file, **vars(options)) for text, file in wanted.items()]
    else:
        tokens = profile_tokens or PROFILE_TOKENS
        built = _from_model(str(model), wanted, options, calib, refine, seed, tokens)
    seconds = time.perf_counter() - start
    if as_json:
        reports = [
            {"artifact": str(file), **summary(one), "seconds": seconds}
            for file, one in zip(wanted.values(), built, strict=True)
        ]
        display.print_json(reports[0] if len(reports) == 1 else reports)
        return
    for file, one in zip(wanted.values(), built, strict=True):
        _print(one, file)
    click.echo(f"  time      {seconds:.1f} s")


def outputs(mem: str, path: Path) -> dict[str, Path]:
    """The file of every target in `mem`: `path` itself where there is one target.

    Raises:
        TargetError: an amount that is none, or one that comes twice.
    """
    texts = [part.strip() for part in mem.split(",")]
    for text in texts:
        parse_memory(text)
    if len(texts) == 1:
        return {texts[0]: path}
    files = {text: path.with_name(f"{path.stem}-{text.replace('%', 'pct')}{path.suffix}") for text in texts}
    if len(files) < len(texts):
        raise TargetError(f"--mem {mem} names a target twice: expected different ones")
    return files


def _from_model(
    name: str, wanted: dict[str, Path], options: Options, calib: str | None, refine: int, seed: int, tokens: int
) -> list[Artifact]:
    from kvcompile.models import load

    with display.quiet_transformers():
        with display.stderr.status(f"loading {name}"):
            loaded = load(name)
        with display.progress_bars() as report:
            return compiler.build_many(
                loaded.model, loaded.tokenizer, dict(wanted), options, calib=calib, refine=refine, seed=seed,
                profile_tokens=tokens, name=loaded.name, report=report,
            )  # fmt: skip


def _print(artifact: Artifact, path: Path) -> None:
    account, solver = artifact.bytes, artifact.solver
    click.echo(f"{path}: {artifact.model.name} at {artifact.target.context} tokens, batch {artifact.target.batch}")
    click.echo(f"  target    {display.human(artifact.target.bytes)}")
    click.echo(
        f"  resident  {display.human(account.resident)}, {account.resident / account.full:.1%} of the full cache"
    )
    click.echo(f"  prefill   {display.human(account.transient)} more for one layer at a time")
    click.echo(f"  weights   {display.human(account.scorer)} of scorer and quantiser, once")
    if "bound" in solver:
        click.echo(
            f"  loss      {artifact.predicted_loss:.4g} nats a token predicted; objective {solver['objective']:.4g}, "
            f"bound {solver['bound']:.4g}, gap {solver['gap']:.2g}"
        )
