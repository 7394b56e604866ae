"""Codecs of other systems, to compare with: used like those of the format, and never in a file."""

from __future__ import annotations

from kvcompile.evaluation.codecs.turboquant.bits3 import CODEC as TURBOQUANT3
from kvcompile.evaluation.codecs.turboquant.bits4 import CODEC as TURBOQUANT4
from kvcompile.kernels.codecs import register


def register_codecs() -> None:
    """Make them known to the account of bytes and the runtime; only who measures them does so."""
    for codec in (TURBOQUANT3, TURBOQUANT4):
        register(codec)


__all__ = ["TURBOQUANT3", "TURBOQUANT4", "register_codecs"]
