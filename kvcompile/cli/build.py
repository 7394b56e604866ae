"""`kvcompile build`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from kvcompile import compiler
from kvcompile.allocators import ALLOCATORS, FILE
from kvcompile.artifacts import Artifact, fetch, write
from kvcompile.assemble import stored_parts
from kvcompile.cli import output, progress, tables
from kvcompile.cli.launched import launched
from kvcompile.cli.wanted import check_name, outputs
from kvcompile.effort import PROFILE_TOKENS, QUICK, THOROUGH, Effort
from kvcompile.kernels.codecs import names
from kvcompile.problem import KV_DTYPES, Options, check_out, check_sequences
from kvcompile.problem.memory import parse_bytes
from kvcompile.report.summary import summary


class AllocatorName(click.Choice[str]):
    """A name, or `file:PATH` for a file of another system."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).startswith(FILE) or value in ALLOCATORS:  # registered after this module was imported
            return value
        return super().convert(value, param, ctx)


POLICIES = ("recent", "window", "h2o", "snapkv", "scored")


@click.command("build", short_help="profile a model, solve for a memory target, write an artifact")
@click.option("--model", metavar="NAME", help="Alias (smollm2-135m), hub id, folder or GGUF file.")
@click.option(
    "--from", "old", metavar="FILE", help="Solve another target from this artifact's loss curves, without the model."
)
@click.option(
    "--mem", required=True, multiple=True, metavar="SIZE",
    help="Bytes of the cache: 8GB, 512MiB, or a share of the full cache such as 25%. Several, separated by commas or "
    "by --mem anew, write one file each.",
)  # fmt: skip
@click.option("--context", type=click.IntRange(1), help="Tokens in a sequence.  [default: the model's]")
@click.option("--batch", type=click.IntRange(1), help="Sequences at once.  [default: 1]")
@click.option(
    "--sequences", type=click.IntRange(1), metavar="N",
    help="In place of --batch, for a serving engine: --mem is all the memory that it has for its cache, in which N "
    "sequences of --context tokens are to run at once; the target is one sequence's part of it. With --tp, SIZE is "
    "that of all ranks together, and what the fullest has above the mean (a percent or two) comes on top.",
)  # fmt: skip
@click.option(
    "--allocator", type=AllocatorName(list(ALLOCATORS)), default="optimal", show_default=True,
    help="How budgets are chosen; or file:PATH, another system's plan or importance scores (see `kvcompile export`).",
)  # fmt: skip
@click.option(
    "--policy", type=click.Choice(POLICIES), help="Which tokens a head keeps.  [default: the allocator's own]"
)
@click.option(
    "--kv-dtype", type=click.Choice(["auto", *KV_DTYPES, *names()]), default="auto",
    show_default=True,
    help="How keys and values are stored; auto: in the model's dtype, and in fewer bits where the loss is then "
    "smaller.",
)  # fmt: skip
@click.option(
    "--classes-per-layer",
    type=click.IntRange(1),
    metavar="K",
    help="At most K different budgets among the heads of a layer.",
)
@click.option("--tp", type=click.IntRange(1), metavar="N", help="Place the heads on N tensor-parallel ranks.")
@click.option(
    "--refine", type=click.IntRange(0), default=0, metavar="N",
    help="Measure the plan and N others with the model, and keep the best.",
)  # fmt: skip
@click.option(
    "--calib", metavar="PATH", help="Text to calibrate on, beside the built-in families: a file, a folder or JSONL."
)
@click.option(
    "--quick", is_flag=True,
    help=f"Profile less, for a first look, in a quarter of the time: contexts of {QUICK.tokens} tokens, one episode of "
    "every other family to fit on and one to measure on. Says what that gives up.",
)  # fmt: skip
@click.option(
    "--profile-tokens", type=click.IntRange(64), metavar="N",
    help=f"Longest context to profile, in tokens.  [default: {PROFILE_TOKENS}, {QUICK.tokens} with --quick]",
)  # fmt: skip
@click.option(
    "--profile-memory", metavar="SIZE",
    help="Bytes that profiling may take (8GB). A model that does not fit is read from its checkpoint layer by layer, "
    "a few times, and what profiling keeps between layers is on disk beyond.  [default: what is free]",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Of the calibration text.  [default: 0]")
@click.option("--out", "-o", metavar="FILE", help="[default: MODEL.kvb in this folder, OLD-new.kvb with --from]")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def command(
    model: str | None, old: str | None, mem: tuple[str, ...], context: int | None, batch: int | None,
    sequences: int | None, allocator: str, policy: str | None, kv_dtype: str, classes_per_layer: int | None,
    tp: int | None, refine: int, calib: str | None, quick: bool, profile_tokens: int | None,
    profile_memory: str | None, seed: int | None, out: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Profile a model, solve for per-head budgets under a memory target, and write an artifact.

    With several targets, each file is named after its own: x.kvb becomes x-25pct.kvb, x-2GB.kvb.
    """
    if (model is None) == (old is None):
        raise click.UsageError("give either --model NAME or --from FILE")
    if old is not None and refine:
        raise click.UsageError("--refine measures with the model: give --model NAME instead of --from FILE")
    profiling = {
        "--profile-tokens": profile_tokens, "--profile-memory": profile_memory, "--quick": quick or None,
        "--calib": calib, "--seed": seed,
    }  # fmt: skip
    for option, value in profiling.items():
        if old is not None and value is not None:
            raise click.UsageError(f"{option} is about profiling the model: give --model NAME instead of --from FILE")
    memory = None if profile_memory is None else parse_bytes(profile_memory)
    if refine and allocator != "optimal":
        raise click.UsageError("--refine works with --allocator optimal only")
    if model is not None:
        check_name(model)
    source = Path(model or old or "")
    stem = source.name.removesuffix(".gguf").removesuffix(".kvb") or "artifact"
    # Without a name of its own, what is solved anew must not take its source's place.
    path = Path(out or (f"{stem}.kvb" if old is None else f"{stem}-new.kvb"))
    wanted = outputs(",".join(mem), path)
    for file in wanted.values():
        check_out(file)
    options = Options(context, batch, allocator, policy, kv_dtype, classes_per_layer, tp, sequences)
    check_sequences(options, wanted)
    start = time.perf_counter()
    if old is not None:
        artifact = fetch(old)
        given = vars(options) | {"parts": stored_parts(artifact)}  # what targets have in common
        built = [compiler.resolve(artifact, mem=text, **given) for text in wanted]
        for one, file in zip(built, wanted.values(), strict=True):
            write(one, file)  # once all targets are known to be possible
    else:
        effort = (QUICK if quick else THOROUGH).at(profile_tokens)
        from kvcompile.kernels.native.measuring import compiled_ahead

        # Before transformers is imported, which takes about as long as the compiler.
        with compiled_ahead() if launched().local == 0 else nullcontext():
            built = _from_model(str(model), wanted, options, calib, refine, seed or 0, effort, memory)
    if not built:
        return  # one of several processes, of which the first writes and reports
    seconds = time.perf_counter() - start
    if as_json:
        reports = [
            {"artifact": str(file), **summary(one), "seconds": seconds}
            for file, one in zip(wanted.values(), built, strict=True)
        ]
        output.print_json(reports[0] if len(reports) == 1 else reports)
        return
    for file, one in zip(wanted.values(), built, strict=True):
        _print(one, file, sequences)
    if given_up := built[0].calibration.get("quick"):
        click.echo(f"  quick     {given_up}")
    click.echo(f"  time      {seconds:.1f} s")


def _from_model(
    name: str,
    wanted: dict[str, Path],
    options: Options,
    calib: str | None,
    refine: int,
    seed: int,
    effort: Effort,
    memory: int | None,
) -> list[Artifact]:
    import torch

    from kvcompile.models import Loaded, free_bytes, load
    from kvcompile.profile import together

    process = launched()
    with output.quiet_transformers(), together() as ranks:
        allowed = (memory or free_bytes(torch.device("cpu"))) // process.here
        device = f"cuda:{process.local}" if ranks.count > 1 and torch.cuda.is_available() else None

        def loading() -> Loaded:
            return load(name, device=device, memory=allowed, tokens=effort.tokens)

        # The first process alone downloads or converts, and says how it goes.
        first: list[Loaded] = []
        with progress.waiting(f"loading {name}") if ranks.rank == 0 else nullcontext():
            ranks.first(lambda: first.append(loading()))
        loaded = first[0] if first else loading()
        with progress.stages() if ranks.rank == 0 else nullcontext() as report:
            return compiler.build_many(
                loaded.model, loaded.tokenizer, dict(wanted), options, calib=calib, refine=refine, seed=seed,
                effort=effort, profile_memory=None if memory is None and process.here == 1 else allowed,
                name=loaded.name, report=report,
            )  # fmt: skip


def _print(artifact: Artifact, path: Path, sequences: int | None) -> None:
    account, solver = artifact.bytes, artifact.solver
    click.echo(f"{path}: {artifact.model.name} at {artifact.target.context} tokens, batch {artifact.target.batch}")
    share = "" if sequences is None else f" for each of {sequences} sequences at once"
    click.echo(f"  target    {output.human(artifact.target.bytes)}{share}")
    click.echo(f"  resident  {output.human(account.resident)}, {account.resident / account.full:.1%} of the full cache")
    click.echo(f"  prefill   {tables.prefill(artifact)}")
    click.echo(f"  weights   {output.human(account.scorer)} of scorer and quantiser, loaded once")
    if "bound" in solver:
        loss = artifact.predicted_loss
        predicted = f"{loss:.4g} nats a token predicted" if loss == loss else "not predicted, as no profile measures it"
        click.echo(
            f"  loss      {predicted}; objective {solver['objective']:.4g}, "
            f"bound {solver['bound']:.4g}, gap {solver['gap']:.2g}"
        )
