"""`kvcompile inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from kvcompile.artifacts import POLICIES, fetch
from kvcompile.cli import output, tables
from kvcompile.problem import check_out
from kvcompile.report import page, report_data
from kvcompile.report.summary import summary


@click.command("inspect", short_help="show what is in an artifact")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option("--json", "as_json", is_flag=True, help="All but the curves as JSON on stdout.")
@click.option(
    "--html", metavar="FILE", help="Write a page with budgets, loss curves and the front of loss over memory."
)
def command(artifact: str, as_json: bool, html: str | None) -> None:
    """Show an artifact's model, byte account, solver report and budgets."""
    plan = fetch(artifact)
    if html is not None:
        check_out(html)
        output.write_text(Path(html), page(report_data(plan)))
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
        output.print_json({**summary(plan), "heads": heads})
        return
    output.stdout.print(tables.account(plan))
    output.stdout.print(tables.budgets(plan))
