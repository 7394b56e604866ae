"""int4 in the Triton kernels, which make their pieces for any codec of whole numbers, by its groups."""

from __future__ import annotations

from kvcompile.kernels.codecs.integers.triton.products import asked, keep, logits, mixed, start
from kvcompile.kernels.codecs.integers.triton.storing import fill, move, put

__all__ = ["asked", "fill", "keep", "logits", "mixed", "move", "put", "start"]
