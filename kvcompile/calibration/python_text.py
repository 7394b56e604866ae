"""Calibration text that every machine has: what the running Python installation carries."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from kvcompile.calibration.family import Family

NO_PROSE = {"encodings", "pydoc_data", "lib2to3", "idlelib", "turtledemo", "ensurepip", "this"}
"""Standard library parts left out: code tables, the language reference, and what not every installation has."""

LEAST_BYTES = 2048
"""Shorter source files are mostly re-exports."""

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_families() -> list[Family]:
    """Two kinds of text, the same for one Python installation: sources of the standard library ("code"), and its
    docstrings, from other files, with the language reference ("reference"), so that no passage comes in both. A family
    whose files are not installed is left out. Nothing is imported but the reference itself.
    """
    sources = _sources()
    families = [
        Family("code", tuple(partial(_read, path) for path in sources[0::2])),
        Family("reference", (*_reference(), *(partial(_docstrings, path) for path in sources[1::2]))),
    ]
    return [family for family in families if family.documents]


def _reference() -> tuple[Callable[[], str], ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # Small distributions of Python leave it out.
        return ()
    # str(text) is text: a document is whatever gives its text when called.
    return tuple(partial(str, topics[name]) for name in sorted(topics))


def _sources() -> list[Path]:
    """Source files of the standard library, sorted by their path within it; tests and foreign packages excluded."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = sys.stdlib_module_names - NO_PROSE
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        is_test = any("test" in part for part in parts)
        if parts[0] in modules and not is_test and path.stat().st_size >= LEAST_BYTES:
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _docstrings(path: Path) -> str:
    """Every docstring of a module under the name of what it describes, in order; "" where the file does not parse."""
    try:
        tree = ast.parse(_read(path))
    except (SyntaxError, ValueError):
        return ""
    module = path.parent.name if path.stem == "__init__" else path.stem
    described = ((name, ast.get_docstring(node)) for name, node in _definitions(tree, module))
    return "\n\n".join(f"{name}\n\n{text}" for name, text in described if text)


def _definitions(node: Definition, name: str) -> Iterator[tuple[str, Definition]]:
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{name}.{child.name}")
