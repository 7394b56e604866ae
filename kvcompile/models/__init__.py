"""Models by name: an alias, a hub id, a folder or a GGUF file; and the element type they are fast in."""

from kvcompile.models.arithmetic import fast_arithmetic, fast_dtype, one_blas_thread
from kvcompile.models.devices import over_devices
from kvcompile.models.load import Loaded, ending_tokens, load
from kvcompile.models.pieces import sampler
from kvcompile.models.room import Room, free_bytes, room

__all__ = [
    "Loaded",
    "Room",
    "ending_tokens",
    "fast_arithmetic",
    "fast_dtype",
    "free_bytes",
    "load",
    "one_blas_thread",
    "over_devices",
    "room",
    "sampler",
]
