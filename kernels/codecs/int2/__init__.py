"""int2: 4 levels symmetric about 0, four elements a byte, the first in its lowest bits."""

from __future__ import annotations

from kvcompile.kernels.codecs.base import Codec

CODEC = Codec(id=2, name="int2", bits=2, package=__name__, format_version=3, profiled="v", pack=4)
