"""`kvcompile export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kvcompile.artifacts import Artifact, ExchangeError, fetch
from kvcompile.cli import output, progress
from kvcompile.problem import check_out


@click.command("export", short_help="write an artifact's plan for another system")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option(
    "--to", "target", required=True, metavar="FORMAT",
    help="onnx (a folder), duoattention (a folder), lukv (.npy), headkv (.json), tangram (.npz) or windows (.json, a "
    "window a layer).",
)  # fmt: skip
@click.option("--out", "-o", metavar="PATH", required=True, help="The file or the folder to write.")
@click.option("--model", metavar="NAME", help="onnx: where to load the model from.  [default: as the artifact says]")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def command(artifact: str, target: str, out: str, model: str | None, as_json: bool) -> None:
    """Write an artifact's plan in the form of another system, and say what is lost: in words, and as the predicted loss
    of what that system will run in the same bytes. As onnx nothing is: that is the whole model with its cache."""
    plan = fetch(artifact)
    if target == "onnx":
        report = write_onnx(plan, model or plan.model.name, Path(out))
        output.print_json(report) if as_json else _print_onnx(report)
        return
    if model is not None:
        raise ExchangeError(f"--model is for onnx alone: {target} is written from the artifact")
    from kvcompile.export import EXPORTS, export, write
    from kvcompile.formats import FORMATS

    if target not in EXPORTS:
        raise ExchangeError(f"there is no format {target!r}: expected one of onnx, {', '.join(EXPORTS)}")
    if not FORMATS[target].folder:
        check_out(out)
    with progress.waiting(f"writing {out}"):
        made = export(plan, target)
        write(made, Path(out))
    before, after = (None if loss != loss else loss for loss in (plan.predicted_loss, made.loss))
    if as_json:
        report = {"out": out, "format": target, "lost": made.lost, "predicted_loss": before, "exported_loss": after}
        output.print_json(report)
        return
    click.echo(f"{out}: {target}")
    click.echo(f"  lost      {made.lost or 'nothing: reading it gives the same budgets'}")
    words = ["unknown" if loss is None else f"{loss:.4g}" for loss in (before, after)]
    click.echo(f"  loss      {words[1]} nats a token predicted, {words[0]} for the artifact itself")


def write_onnx(plan: Artifact, name: str, out: Path) -> dict[str, Any]:
    """Load the model in float32 and write it with its cache.

    Raises:
        ExchangeError: no package `onnx`, or what `kvcompile.export.onnx.export` refuses.
    """
    try:
        from kvcompile.export.onnx import export
    except ImportError:
        raise ExchangeError("writing ONNX needs one more package: pip install onnx") from None
    import torch

    from kvcompile.models import load

    with output.quiet_transformers():
        with progress.waiting("loading the model"):
            loaded = load(name, dtype=torch.float32, device="cpu")
        with progress.waiting(f"writing {out}"):
            made = export(plan, loaded.model, loaded.tokenizer, out)
    return {
        "out": str(out), "format": "onnx", "lost": None, "cache_bytes": made.cache, "weight_bytes": made.weights,
        "nodes": made.nodes,
    }  # fmt: skip


def _print_onnx(report: dict[str, Any]) -> None:
    click.echo(f"{report['out']}: onnx, {report['nodes']} nodes")
    click.echo("  lost      nothing")
    click.echo(f"  cache     {output.human(report['cache_bytes'])}, as the artifact promises")
    click.echo(f"  weights   {output.human(report['weight_bytes'])} in float32")
