"""`kvcompile push`."""

from __future__ import annotations

import click

from kvcompile.artifacts import push
from kvcompile.cli import output, progress


@click.command("push", short_help="put an artifact into a repository on the Hugging Face hub")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--name", metavar="FILE.kvb", help="Name in the repository.  [default: the file's own]")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def command(artifact: str, repo: str, name: str | None, private: bool, as_json: bool) -> None:
    """Check a file and put it on the hub, with a model card where the repository has none; log in with `hf auth login`
    first. Then `kvcompile run OWNER/NAME` and `attach(model, "OWNER/NAME")` load it."""
    with progress.waiting(f"pushing to {repo}"):
        commit = push(artifact, repo, name=name, private=private)
    if as_json:
        output.print_json({"artifact": artifact, "repo": repo, "commit": commit})
    else:
        click.echo(commit)
