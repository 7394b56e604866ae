"""Models by name: an alias, a hub id, a folder or a GGUF file."""

from kvcompile.models.load import Loaded, load

__all__ = ["Loaded", "load"]
