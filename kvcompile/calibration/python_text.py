"""Calibration text that every machine has: what the running Python installation carries."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Callable, Iterator, Set
from functools import partial
from pathlib import Path

from kvcompile.calibration.family import Family

NO_PROSE = {"encodings", "pydoc_data", "lib2to3", "idlelib", "turtledemo", "ensurepip", "this"}
"""Standard library parts left out: code tables, the language reference, and what not every installation has."""

HELD_OUT = {"doctest", "unittest", "idlelib", "turtledemo"}
"""Parts that no calibration reads, for evaluation: the first two, which every installation has, are left out by
`python_families` for their names, the others are in `NO_PROSE`. Not lib2to3, half of which is a copy of tokenize."""

LEAST_BYTES = 2048
"""Shorter source files are mostly re-exports."""

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_families() -> list[Family]:
    """Two kinds of text, the same for one Python installation: sources of the standard library ("code"), and its
    docstrings, from other files, with the language reference ("reference"), so that no passage comes in both. A family
    whose files are not installed is left out. Nothing is imported but the reference itself.
    """
    paths = _paths(sys.stdlib_module_names - NO_PROSE)
    return _families(_no_tests(paths), _reference())


def held_out_python_families() -> list[Family]:
    """The same two kinds from `HELD_OUT`, the tests of these parts left out: text for evaluation."""
    return _families(_no_tests(_paths(HELD_OUT), below=1), ())


def _families(sources: list[Path], reference: tuple[Callable[[], str], ...]) -> list[Family]:
    families = [
        Family("code", tuple(partial(_read, path) for path in sources[0::2])),
        Family("reference", (*reference, *(partial(_docstrings, path) for path in sources[1::2]))),
    ]
    return [family for family in families if family.documents]


def _reference() -> tuple[Callable[[], str], ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # Small distributions of Python leave it out.
        return ()
    # str(text) is text: a document is whatever gives its text when called.
    return tuple(partial(str, topics[name]) for name in sorted(topics))


def _paths(modules: Set[str]) -> list[Path]:
    """Source files of these modules of the standard library, sorted by their path within it; short ones left out."""
    root = Path(sysconfig.get_path("stdlib"))
    # Module by module: below the same folder lie all packages that have been installed.
    found = [path for name in modules for path in (root / f"{name}.py", *(root / name).rglob("*.py")) if path.is_file()]
    found = [path for path in found if path.stat().st_size >= LEAST_BYTES]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _no_tests(paths: list[Path], below: int = 0) -> list[Path]:
    """Without files whose path within the standard library, its first `below` parts aside, speaks of tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path
        for path in paths
        if not any("test" in part for part in path.relative_to(root).with_suffix("").parts[below:])
    ]


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
