"""Models by name: an alias, a hub id, a folder or a GGUF file."""

from kvcompile.models.load import Loaded, ending_tokens, load

__all__ = ["Loaded", "ending_tokens", "load"]
