"""The command line: `kvcompile build | run | serve | eval | inspect | verify | export | push | bench`."""

from __future__ import annotations

import errno
import importlib
import os
import sys

import click

from kvcompile import __version__
from kvcompile.artifacts import KvcompileError

COMMANDS = {
    "build": "profile a model, solve for a memory target, write an artifact",
    "run": "answer a prompt inside an artifact's budget",
    "serve": "start a vLLM server whose caches are an artifact's",
    "eval": "measure quality at several budgets, beside other methods",
    "inspect": "show what is in an artifact",
    "verify": "check an artifact, and its byte account against a model",
    "export": "write an artifact's plan for another system",
    "push": "put an artifact into a repository on the Hugging Face hub",
    "bench": "measure the speed of kernels, decoding and prefill",
}


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of a file that cannot grow: for lack of space, by a quota, by a limit."""


class Commands(click.Group):
    """Loads a command's module, and with it torch and transformers, only when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"kvcompile.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvcompile")
def cli() -> None:
    """An offline compiler for the KV cache of decoder language models."""


def main() -> None:
    """Run the command line. A user's mistake is one sentence on stderr and exit status 2."""
    try:
        status = cli(standalone_mode=False)
        sys.stdout.flush()  # while what goes wrong can still be said
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except (KvcompileError, click.ClickException) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"error: {' '.join(message.split())}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: nothing was written", err=True)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if not isinstance(error, MemoryError) and not torchs:
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0].rstrip(".")
        click.echo(f"error: there is not enough memory ({reason}): ask for less, such as a smaller --context", err=True)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        sys.exit(141)
    except OSError as error:
        if error.errno not in FULL:
            raise
        # What did not fit is given up, or Python would try once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        click.echo(
            f"error: what was to be written does not fit ({error.strerror}): make room, or write elsewhere", err=True
        )
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)
