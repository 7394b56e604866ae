"""int4: 16 levels symmetric about 0, two elements a byte, the first in its low half."""

from __future__ import annotations

from kvcompile.kernels.codecs.base import Codec

CODEC = Codec(id=4, name="int4", bits=4, package=__name__, format_version=2)
