"""kvcompile: an offline compiler for the KV cache of decoder language models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["build", "__version__"]

if TYPE_CHECKING:
    from kvcompile.compiler import build

# In a checkout `artifacts`, `kernels` and `runtime` are this folder's siblings; installed, they lie inside it. Python
# started in the checkout finds this file first, whatever is installed, so the siblings have to be reachable from here.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "artifacts" / "FORMAT.md").is_file():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    # Lazy, so that `import kvcompile.runtime` loads neither scipy nor click.
    if name == "build":
        from kvcompile.compiler import build

        return build
    raise AttributeError(f"module 'kvcompile' has no attribute {name!r}")
