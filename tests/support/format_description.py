"""FORMAT.md, and the functions of its own program."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import kvcompile.artifacts

TEXT = (Path(kvcompile.artifacts.__file__).parent / "FORMAT.md").read_text(encoding="utf-8")


def program() -> SimpleNamespace:
    """What the program defines, which imports nothing but the standard library and numpy."""
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL).group(1)
    imported = [
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names
    ]
    assert sorted(imported) == ["hashlib", "json", "numpy", "struct"]
    assert "from " not in code
    names: dict[str, object] = {}
    exec(code, names)
    return SimpleNamespace(**names)
