"""`python -m kvcompile`."""

from kvcompile.cli import main

main()
