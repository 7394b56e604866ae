"""Plan -> artifact: the order of heads, their placement on ranks, the account of bytes, the profile's arrays."""

from kvcompile.assemble.artifact import RECORDED, assemble, at_context
from kvcompile.assemble.placement import place
from kvcompile.assemble.tables import stored_parts, stored_profile

__all__ = ["RECORDED", "assemble", "at_context", "place", "stored_parts", "stored_profile"]
