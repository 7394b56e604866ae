"""The page: a template with the data embedded."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

MARK = "{{DATA}}"
"""Where the template takes the data."""


def page(data: dict[str, Any]) -> str:
    """One HTML document that needs nothing else. The data is inert JSON in a script element: `<` is escaped, so that
    no name in an artifact ends the element, and the page sets texts, never markup."""
    template = (files("kvcompile.report") / "template.html").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace(MARK, text)
