"""Where kvcompile keeps what is slow to make again: converted models and unfinished profiles."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """`~/.cache/kvcompile`, or the folder that the environment variable KVCOMPILE_CACHE names; not created here."""
    root = os.environ.get("KVCOMPILE_CACHE") or "~/.cache/kvcompile"
    return Path(root).expanduser().absolute().joinpath(*parts)
