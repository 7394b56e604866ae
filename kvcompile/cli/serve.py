"""`kvcompile serve`."""

from __future__ import annotations

import os
import re
import shlex
import sys

import click

from kvcompile.artifacts import CacheError, ModelError, fetch
from kvcompile.cli import output
from kvcompile.integrations.vllm import LOAD_FORMAT, line
from kvcompile.integrations.vllm.version import DISTRIBUTIONS, check_version, installed


class ServeCommand(click.Command):
    """Says where vLLM's own options stand: click would guess at one of ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise click.UsageError(
                f"serve has no option {error.option_name}: vLLM's own stand after --, as in kvcompile serve x.kvb -- "
                f"{error.option_name} ..."
            ) from None


@click.command("serve", cls=ServeCommand, short_help="start a vLLM server whose caches are an artifact's")
@click.argument("artifact", metavar="ARTIFACT.kvb")
@click.argument("arguments", metavar="[-- VLLM ARGUMENTS]", nargs=-1, type=click.UNPROCESSED)
@click.option("--model", metavar="NAME", help="Alias, hub id or folder of the model.  [default: as the artifact says]")
@click.option("--context", type=click.IntRange(1), help="Most tokens of a sequence.  [default: the artifact's context]")
@click.option(
    "--prefixes", type=click.IntRange(1), metavar="N",
    help="Keep the states of up to N shared prefixes, for prompts that begin with them (see docs/serving.md).",
)  # fmt: skip
@click.option("--print", "only_print", is_flag=True, help="Print the command line on stdout and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON: start nothing.")
def command(
    artifact: str, arguments: tuple[str, ...], model: str | None, context: int | None, prefixes: int | None,
    only_print: bool, as_json: bool,
) -> None:  # fmt: skip
    """Start vLLM's OpenAI-compatible server with an artifact, a file or a repository on the hub: every sequence has one
    page of constant size for its cache. What stands after -- goes to vLLM (`--port`, `--tensor-parallel-size` ...)."""
    starts = not (only_print or as_json)
    try:
        distribution, version = installed()
        check_version(version)
    except CacheError:
        if starts:
            raise
        distribution, version = DISTRIBUTIONS[0], None  # which is enough to show the command
    check_plugins(os.environ.get("VLLM_PLUGINS"))
    lengths = [one.value for one in line.parse(arguments) if one.name == line.LENGTH]
    if context is not None and lengths:
        raise CacheError("--context and --max-model-len both say how long sequences get: give one of them")
    plan = fetch(artifact)
    options = line.with_given(plan, line.of_artifact(plan, artifact, context, prefixes), arguments)
    served = served_model(plan.model.name, model)

    from kvcompile.integrations.vllm.refusals import refuse_artifact

    refuse_artifact(plan, context or plan.target.context)
    shown, words = line.server(distribution, served, options)
    if as_json:
        most = context or line.tokens(lengths[-1] if lengths else None) or plan.target.context
        output.print_json({
            "command": shown, "model": served, "artifact": artifact, "context": most,
            "artifact_bytes": plan.bytes.resident // plan.target.batch, "vllm": version,
        })  # fmt: skip
        return
    click.echo(shlex.join(shown), err=not only_print)
    if starts:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *words])


def served_model(name: str, given: str | None) -> str:
    """What vLLM is to load: a folder or a hub id, from `given` or else from the artifact's name of its model.

    Raises:
        ModelError: what is neither.
    """
    from kvcompile.models.aliases import hub_id

    source = given or name
    if (known := hub_id(source)) is not None:
        return known
    if os.path.isdir(source):
        return os.path.abspath(source)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not source.endswith(".gguf"):
        return source
    if given is not None:
        raise ModelError(
            f"the model {given} is neither a folder here nor a hub id: expected a checkpoint of safetensors"
        )
    raise ModelError(
        f"the artifact's model is {name}, neither a folder here nor a hub id: give --model, a folder or hub id of its "
        "checkpoint"
    )


def check_plugins(allowed: str | None) -> None:
    """Raises CacheError: vLLM would not load our plugin; `allowed` is $VLLM_PLUGINS."""
    if allowed is not None and LOAD_FORMAT not in allowed.split(","):
        raise CacheError(f"VLLM_PLUGINS is {allowed!r}, so that vLLM would not load ours: add {LOAD_FORMAT} to it")
