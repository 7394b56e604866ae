"""`kvcompile verify`."""

from __future__ import annotations

from typing import Any

import click

from kvcompile.artifacts import Artifact, ArtifactError, fetch
from kvcompile.cli import output, progress


@click.command("verify", short_help="check an artifact, and its byte account against a model")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.option("--model", metavar="NAME", help="Also check that the artifact is for this model, and allocate a cache.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def command(artifact: str, model: str | None, as_json: bool) -> None:
    """Check a file field by field; with --model, the model's fingerprint and the bytes of a real cache too."""
    plan = fetch(artifact)
    report: dict[str, Any] = {"artifact": artifact, "valid": True, "resident_bytes": plan.bytes.resident}
    if model is not None:
        report |= {"model": model, "measured_bytes": measured_bytes(plan, artifact, model)}
    if as_json:
        output.print_json(report)
        return
    click.echo(f"{artifact}: valid, {output.human(plan.bytes.resident)} for {plan.model.name}")
    if model is not None:
        click.echo(
            f"{model}: the model that the artifact is for; a cache takes {output.human(report['measured_bytes'])}"
        )


def measured_bytes(plan: Artifact, source: str, model: str) -> int:
    """Bytes of a cache that is really allocated for the model.

    Raises:
        ModelError: another model.
        ArtifactError: bytes that are not those promised.
    """
    import torch

    from kvcompile.models import load
    from kvcompile.runtime import attach

    with output.quiet_transformers(), progress.waiting(f"loading {model}"):
        loaded = load(model, dtype=getattr(torch, plan.model.dtype))
        measured = attach(loaded.model, plan).new_cache(plan.target.batch).nbytes
    if measured != plan.bytes.resident:
        raise ArtifactError(f"{source}: a cache takes {measured} bytes, expected the {plan.bytes.resident} it promises")
    return measured
