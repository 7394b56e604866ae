"""The command line: `main`, and one file a command."""

from kvcompile.cli.main import cli, main

__all__ = ["cli", "main"]
