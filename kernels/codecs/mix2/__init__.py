"""mix2: the first quarter of the elements in 4 bits, the next half in 2, the rest not at all."""

from __future__ import annotations

from kvcompile.kernels.codecs.base import Codec

CODEC = Codec(id=66, name="mix2", bits=2, package=__name__, format_version=3, profiled="k", sections=((4, 2), (2, 4)))
