"""`kvcompile bench`."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

import click

from kvcompile.artifacts import TargetError, check_identity, fetch, identify
from kvcompile.cli import output, progress, tables
from kvcompile.problem import check_out
from kvcompile.problem.memory import parse_memory

PARTS = ("kernels", "decode", "prefill")


@click.command("bench", short_help="measure the speed of kernels, decoding and prefill")
@click.argument("artifact", metavar="[ARTIFACT.kvb]", required=False)
@click.option(
    "--random-weights", metavar="NAME", help="Instead of an artifact: a known model's shape, with ragged budgets."
)
@click.option("--model", metavar="NAME", help="Where to load the model from.  [default: as the artifact says]")
@click.option("--parts", default=",".join(PARTS), show_default=True, metavar="NAMES", help="What to measure.")
@click.option("--context", type=click.IntRange(256), help="Tokens in a sequence.  [default: the artifact's, or 8192]")
@click.option("--batch", type=click.IntRange(1), help="Sequences at once.  [default: the artifact's, or 1]")
@click.option("--mem", help="Share of the full cache, for --random-weights.  [default: 25%]")
@click.option("--widths", "bits", type=click.Choice(["16", "8", "4", "mixed"]),
              help="Bits of keys and values, for --random-weights.  [default: 16]")  # fmt: skip
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of weights and cache.  [default: the artifact's]",
)
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="Decode steps to time.")
@click.option(
    "--rounds", type=click.IntRange(1), default=9, show_default=True, help="Repetitions, for kernels and prefill."
)
@click.option("--json", "json_out", metavar="FILE", help="Write everything measured as JSON.")
def command(
    artifact: str | None, random_weights: str | None, model: str | None, parts: str, context: int | None,
    batch: int | None, mem: str | None, bits: str | None, dtype: str | None, tokens: int, rounds: int,
    json_out: str | None,
) -> None:  # fmt: skip
    """Measure an artifact's model, or a known shape with random weights: attention of one layer against the bytes it
    reads, decoding end to end beside transformers' full cache, and what the compiled scorer costs at prefill. All
    figures in a table come from one run in which the methods take turns."""
    if (artifact is None) == (random_weights is None):
        raise click.UsageError("expected either an ARTIFACT.kvb or --random-weights NAME")
    if artifact is not None and (mem or bits):
        raise click.UsageError("--mem and --widths are for --random-weights: an artifact has its own budgets and bits")
    if random_weights is not None and model is not None:
        raise click.UsageError("--model is for an artifact: --random-weights names the shape that is measured")
    mem, bits = mem or "25%", bits or "16"
    chosen = [part.strip() for part in parts.split(",")]
    if unknown := [part for part in chosen if part not in PARTS]:
        raise click.UsageError(f"there is no part {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    check_out(json_out)
    share = parse_memory(mem)
    if not share.is_share or not 0 < share.amount <= 100:
        raise TargetError(f"--mem {mem}: expected a share of the full cache such as 25%")
    plan = None if artifact is None else fetch(artifact)

    import torch

    from kvcompile.bench.subjects import ragged_plan, random_model
    from kvcompile.models import load

    with output.quiet_transformers():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if plan is not None:
            kind = dtype or plan.model.dtype
            subject = load(model or plan.model.name, dtype=getattr(torch, kind)).model
            check_identity(plan.model, identify(subject, plan.model.name))
            context, batch, identity = context or plan.target.context, batch or plan.target.batch, plan.model
        else:
            assert random_weights is not None
            kind = dtype or "bfloat16"
            subject = random_model(random_weights, getattr(torch, kind), device)
            context, batch, identity = context or 8192, batch or 1, identify(subject, random_weights)
            plan = ragged_plan(identity, context, batch, float(share.amount) / 100, kind, bits)
        found: dict[str, Any] = {"setting": _setting(device, identity.name, context, batch, kind, plan)}
        with progress.stages() as report:
            for number, part in enumerate(chosen):
                report("measuring", number, len(chosen))
                found[part] = _measure(part, subject, plan, context, batch, kind, tokens, rounds)
    if json_out is not None:
        output.write_text(Path(json_out), json.dumps(found, indent=1) + "\n")
    console = output.wide()
    console.print(", ".join(f"{name} {value}" for name, value in found["setting"].items()))
    for part in chosen:
        done = found[part] if part == "prefill" else [row for row in found[part] if not row.get("error")]
        console.print(tables.speed(part, done))
        for row in found[part] if part == "kernels" else []:
            if row["error"]:
                console.print(f"{row['method']}: {row['error']}")


def _measure(part: str, model: Any, plan: Any, context: int, batch: int, dtype: str, tokens: int, rounds: int) -> Any:
    from kvcompile.bench.decode import measure_decode
    from kvcompile.bench.kernels import measure_kernels
    from kvcompile.bench.prefill import measure_prefill

    if part == "kernels":
        share = plan.bytes.resident / plan.bytes.full
        rows = measure_kernels(plan.model, context, batch, share, dtype, model.device, rounds)
        every = [dataclasses.asdict(row) for row in rows]
        # JSON knows no NaN, which is what a method that failed has for numbers.
        return [{name: None if value != value else value for name, value in row.items()} for row in every]
    if part == "decode":
        return [dataclasses.asdict(row) for row in measure_decode(model, plan, batch, context, tokens)]
    return measure_prefill(model, plan, batch, min(context, 4096), rounds)


def _setting(device: Any, name: str, context: int, batch: int, dtype: str, plan: Any) -> dict[str, Any]:
    """What a reader has to know to compare figures."""
    import torch

    processor = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    )
    packages = [p for p in ("kvcompile", "torch", "triton", "transformers") if importlib.util.find_spec(p) is not None]
    return {
        "model": name, "context": context, "batch": batch, "dtype": dtype,
        "share": f"{plan.bytes.resident / plan.bytes.full:.1%}", "device": processor,
        "python": platform.python_version(), **{package: importlib.metadata.version(package) for package in packages},
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
