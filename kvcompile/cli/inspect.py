"""`kvcompile inspect`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from kvcompile.artifacts import POLICIES, Artifact, fetch, token_limits
from kvcompile.cli import display
from kvcompile.cli.display import write_text
from kvcompile.problem import check_out
from kvcompile.report import page, report_data
from kvcompile.report.summary import quantised_positions, summary

SHADES = ("grey35", "blue", "cyan", "green", "yellow", "red")
"""From the smallest share of a head's limit to the whole of it."""

LETTERS = {"full": "F", "recent": "R", "h2o": "H", "snapkv": "K", "scored": "S"}


@click.command("inspect", short_help="show what is in an artifact")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option("--json", "as_json", is_flag=True, help="Everything but the curves as JSON on stdout.")
@click.option("--html", metavar="FILE", help="Write a page with budgets, loss curves and loss over memory.")
def command(artifact: str, as_json: bool, html: str | None) -> None:
    """Show an artifact's model, byte account, solver report and budgets."""
    plan = fetch(artifact)
    if html is not None:
        check_out(html)
        write_text(Path(html), page(report_data(plan)))
    if as_json:
        budgets = plan.budgets
        heads = {
            "policy": [[POLICIES[code] for code in row] for row in budgets.policy],
            **{
                name: getattr(budgets, name).tolist()
                for name in ("capacity", "sink", "recent", "k_bits", "v_bits", "head_order")
            },
            "rank": None if plan.rank is None else plan.rank.tolist(),
        }
        display.print_json({**summary(plan), "heads": heads})
        return
    display.stdout.print(account(plan))
    display.stdout.print(budget_table(plan))


def account(plan: Artifact) -> Table:
    """Model, target, bytes, solver and calibration as one table."""
    table = Table(title=f"{plan.model.name} ({plan.model.architecture})", show_header=False, title_justify="left")
    model, target, size = plan.model, plan.target, plan.bytes
    table.add_row(
        "shape",
        f"{model.num_layers} layers, {model.num_attention_heads} query / {model.num_kv_heads} KV heads of "
        f"{model.head_dim}",
    )
    table.add_row("for", f"{target.batch} x {target.context} tokens in {target.dtype}")
    table.add_row("target", display.human(target.bytes))
    table.add_row("resident", f"{display.human(size.resident)}, {size.resident / size.full:.1%} of the full cache")
    table.add_row("scorer", f"{display.human(size.scorer)} of scorer and quantiser, loaded once")
    positions = quantised_positions(plan)
    if positions is not None:
        sliding = ", in sliding layers at those of the last window" if any(model.windows) else ""
        table.add_row("quantiser", f"made for keys at positions 0 to {positions - 1}{sliding}")
    table.add_row("full cache", display.human(size.full))
    table.add_row("prefill", f"{display.human(size.transient)} more for one layer at a time")
    if plan.predicted_loss == plan.predicted_loss:
        table.add_row("predicted loss", f"{plan.predicted_loss:.4g} nats a token")
    for title, values in (("solver", plan.solver), ("calibration", plan.calibration), ("versions", plan.versions)):
        plain = {name: value for name, value in values.items() if not isinstance(value, list | dict)}
        table.add_row(title, ", ".join(f"{name} {_short(value)}" for name, value in plain.items()))
    return table


def budget_table(plan: Artifact) -> Table:
    """Tokens of every head, a row a layer, shaded by the share of what the head could use."""
    title = "tokens kept by head (F full, R recent, H h2o, K snapkv, S scored) and bits of its keys/values"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    for head in range(plan.model.num_kv_heads):
        table.add_column(f"head {head}", justify="right")
    table.add_column("share", justify="right")
    limits = token_limits(plan.model.windows, plan.target.context)
    for layer, limit in enumerate(limits):
        row = plan.budgets.capacity[layer]
        cells = [
            Text(
                f"{LETTERS[POLICIES[plan.budgets.policy[layer, head]]]} {tokens} "
                f"{plan.budgets.k_bits[layer, head]}/{plan.budgets.v_bits[layer, head]}",
                SHADES[min(len(SHADES) - 1, int(tokens / limit * len(SHADES)))],
            )
            for head, tokens in enumerate(row.tolist())
        ]
        table.add_row(str(layer), *cells, f"{row.sum() / (limit * len(row)):.0%}")
    return table


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
