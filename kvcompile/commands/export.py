"""`kvcompile export`."""

from __future__ import annotations

from pathlib import Path

import click

from kvcompile import display
from kvcompile.artifacts import fetch


@click.command("export", short_help="write an artifact's plan for another system")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option(
    "--to", "target", required=True, metavar="FORMAT",
    help="duoattention (a folder), lukv (.npy), headkv (.json), tangram (.npz) or windows (.json, a window a layer).",
)  # fmt: skip
@click.option("--out", "-o", metavar="PATH", required=True, help="The file, or for duoattention the folder, to write.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def command(artifact: str, target: str, out: str, as_json: bool) -> None:
    """Write an artifact's plan in the form of another system, and say what is lost: in words, and as the predicted loss
    of what that system will run in the same bytes."""
    from kvcompile import exchange

    plan = fetch(artifact)
    with display.stderr.status(f"writing {out}"):
        made = exchange.export(plan, target)
        exchange.write(made.files, exchange.FORMATS[target], Path(out))
    before, after = (None if loss != loss else loss for loss in (plan.predicted_loss, made.loss))
    if as_json:
        report = {"out": out, "format": target, "lost": made.lost, "predicted_loss": before, "exported_loss": after}
        display.print_json(report)
        return
    click.echo(f"{out}: {target}")
    click.echo(f"  lost      {made.lost or 'nothing: reading it gives the same budgets'}")
    words = ["unknown" if loss is None else f"{loss:.4g}" for loss in (before, after)]
    click.echo(f"  loss      {words[1]} nats a token predicted, {words[0]} for the artifact itself")
