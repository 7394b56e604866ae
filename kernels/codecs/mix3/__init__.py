"""mix3: the first half of the elements in 4 bits, the other in 2."""

from __future__ import annotations

from kvcompile.kernels.codecs.base import Codec

CODEC = Codec(id=67, name="mix3", bits=3, package=__name__, format_version=3, profiled="k", sections=((4, 4), (2, 4)))
