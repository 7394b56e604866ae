"""`kvcompile verify`."""

from __future__ import annotations

from typing import Any

import click

from kvcompile.artifacts import Artifact, ArtifactError, fetch
from kvcompile.cli import display


@click.command("verify", short_help="check an artifact, and its byte account against a model")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option("--model", metavar="NAME", help="Also check that it is for this model, and allocate its cache.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def command(artifact: str, model: str | None, as_json: bool) -> None:
    """Check a file field by field; with a model, check its fingerprint and measure the bytes that a cache takes."""
    plan = fetch(artifact)
    report: dict[str, Any] = {"artifact": artifact, "valid": True, "resident_bytes": plan.bytes.resident}
    if model is not None:
        report |= {"model": model, "measured_bytes": measured_bytes(plan, artifact, model)}
    if as_json:
        display.print_json(report)
        return
    click.echo(f"{artifact}: valid, {display.human(plan.bytes.resident)} for {plan.model.name}")
    if model is not None:
        click.echo(f"{model}: is the model it is for, and a cache takes {display.human(report['measured_bytes'])}")


def measured_bytes(plan: Artifact, source: str, model: str) -> int:
    """Bytes of a cache that is really allocated for the model.

    Raises:
        ModelError: another model.
        ArtifactError: bytes that are not those promised.
    """
    import torch

    from kvcompile.models import load
    from kvcompile.runtime import attach

    with display.quiet_transformers(), display.stderr.status(f"loading {model}"):
        loaded = load(model, dtype=getattr(torch, plan.model.dtype))
        measured = attach(loaded.model, plan).new_cache(plan.target.batch).nbytes
    if measured != plan.bytes.resident:
        raise ArtifactError(f"{source}: a cache takes {measured} bytes, expected the {plan.bytes.resident} it promises")
    return measured
