"""The name under which `kvcompile.integrations.kvpress` was first published."""

from kvcompile.integrations.kvpress import KvcompilePress

__all__ = ["KvcompilePress"]
