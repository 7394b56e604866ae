"""mix1: the first eighth of the elements in 4 bits, the next quarter in 2, the rest not at all."""

from __future__ import annotations

from kvcompile.kernels.codecs.base import Codec

CODEC = Codec(id=65, name="mix1", bits=1, package=__name__, format_version=3, profiled="k", sections=((4, 1), (2, 2)))
