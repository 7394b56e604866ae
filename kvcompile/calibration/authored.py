"""Calibration text of our own: kinds that no Python installation carries, written for this purpose."""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable

from kvcompile.calibration.family import Family

KINDS = ("dialogue", "essay", "paper")
"""Families of the files `texts/KIND-NAME.txt`."""

SECTION = "\n\n\n"
"""Two empty lines part the documents of a file."""


def authored_families() -> list[Family]:
    """Conversations, essays and scientific papers to calibrate on."""
    return families_in(files("kvcompile.calibration") / "texts")


def families_in(folder: Traversable) -> list[Family]:
    """A family for each of KINDS; every section of a file is a document."""
    texts = sorted(folder.iterdir(), key=lambda file: file.name)
    documents = {kind: [d for t in texts if t.name.startswith(f"{kind}-") for d in _sections(t)] for kind in KINDS}
    return [Family(kind, tuple(found)) for kind, found in documents.items()]


def _sections(file: Traversable) -> list[partial[str]]:
    return [partial(str, text) for text in file.read_text(encoding="utf-8").split(SECTION) if text.strip()]
