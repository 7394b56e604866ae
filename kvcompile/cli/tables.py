"""The tables that commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from kvcompile.artifacts import (
    POLICIES,
    PREFILL_CHUNK,
    Artifact,
    prefill_bytes,
    state_bytes,
    states_name,
    token_limits,
)
from kvcompile.cli.output import human
from kvcompile.kernels.codecs import label
from kvcompile.report.summary import quantised_positions

if TYPE_CHECKING:
    from kvcompile.evaluation.ruler import Scores
    from kvcompile.evaluation.summary import Summary  # imports torch, which `inspect` does without

SHADES = ("grey35", "blue", "cyan", "green", "yellow", "red")
"""From the smallest share of a head's limit to the whole of it."""

LETTERS = {"full": "F", "recent": "R", "h2o": "H", "snapkv": "K", "scored": "S"}


def quality(summaries: Sequence[Summary], title: str) -> Table:
    """What `eval` measured: one row a plan, the best of each budget first."""
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


def ruler(plans: Sequence[Scores], title: str) -> Table:
    """Scores of RULER's tasks: one row a plan, the best of each budget first; all go into a pipe's width."""
    found = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    narrow = [task.replace("_", "\n").replace("multi", "multi\n") for task in plans[0].tasks]
    for name in ("method", "bytes", *narrow, "average"):
        found.add_column(name, justify="left" if name == "method" else "right", no_wrap=name == "method")
    budget = plans[0].budget
    for one in plans:
        if one.budget != budget:
            found.add_section()
            budget = one.budget
        numbers = (f"{value:.1f}" for value in (*one.tasks.values(), one.average))
        found.add_row(one.method, f"{one.share:.2%}", *numbers)
    return found


def speed(part: str, found: Any) -> Table:
    """What `bench` measured in one of its parts."""
    if part == "prefill":
        return _prefill(found)
    return _decode(found) if part == "decode" else _kernels(found)


def _kernels(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("attention of a layer", "bytes", "of full", "us", "of copy bandwidth", "times the best full")
    for row in rows:
        table.add_row(
            row["method"], f"{row['bytes'] / 1e6:.1f} MB", f"{row['share']:.1%}", f"{row['seconds'] * 1e6:.1f}",
            f"{row['of_copy']:.0%}", f"{row['speedup']:.2f}",
        )  # fmt: skip
    return table


def _decode(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("decode", "cache", "ms a step", "tokens/s", "of copy bandwidth", "host waits")
    for row in rows:
        waits = "-" if row["host_syncs"] is None else str(row["host_syncs"])
        table.add_row(
            row["method"], f"{row['cache_bytes'] / 1e6:.1f} MB", f"{row['seconds'] * 1e3:.2f}",
            f"{row['tokens_per_second']:.1f}", f"{row['of_copy']:.0%}", waits,
        )  # fmt: skip
    return table


def _prefill(seconds: Mapping[str, float]) -> Table:
    table = Table("prefill", "seconds", "of full cache", title_justify="left")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.3f}", f"{value / seconds['full cache']:.3f}")
    return table


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
    table.add_row("target", human(target.bytes))
    table.add_row("resident", f"{human(size.resident)}, {size.resident / size.full:.1%} of the full cache")
    if states := state_bytes(model, target.dtype):
        table.add_row("beside these", f"{human(states)} a sequence of {states_name(model)}, all counted")
    table.add_row("scorer", f"{human(size.scorer)} of scorer and quantiser, loaded once")
    positions = quantised_positions(plan)
    if positions is not None:
        sliding = (
            ", in sliding layers at those of the last window"
            if any(0 < window < target.context for window in model.windows)
            else ""
        )
        table.add_row("quantiser", f"made for keys at positions 0 to {positions - 1}{sliding}")
    table.add_row("full cache", human(size.full))
    table.add_row("prefill", prefill(plan))
    if plan.predicted_loss == plan.predicted_loss:
        table.add_row("predicted loss", f"{plan.predicted_loss:.4g} nats a token")
    for title, values in (("solver", plan.solver), ("calibration", plan.calibration), ("versions", plan.versions)):
        plain = {name: value for name, value in values.items() if not isinstance(value, list | dict)}
        table.add_row(title, ", ".join(f"{name} {_short(value)}" for name, value in plain.items()))
    return table


def prefill(plan: Artifact) -> str:
    """What reading the target's prompts takes beside weights and cache."""
    most = prefill_bytes(plan, plan.target.batch, plan.target.context)
    return (
        f"up to {human(most)} more while prompts are read, {PREFILL_CHUNK} tokens at a time: "
        f"{human(plan.bytes.transient)} keys and values of one layer, hidden states, and a chunk"
    )


def budgets(plan: Artifact) -> Table:
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
                f"{LETTERS.get(name := POLICIES[plan.budgets.policy[layer, head]], name)} {tokens} "
                f"{label(plan.budgets.k_bits[layer, head])}/{label(plan.budgets.v_bits[layer, head])}",
                SHADES[min(len(SHADES) - 1, int(tokens / limit * len(SHADES)))],
            )
            for head, tokens in enumerate(row.tolist())
        ]
        table.add_row(str(layer), *cells, f"{row.sum() / (limit * len(row)):.0%}")
    return table


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
