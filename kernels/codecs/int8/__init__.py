"""int8: 256 levels symmetric about 0, a byte an element."""

from __future__ import annotations

from kvcompile.kernels.codecs.base import Codec

CODEC = Codec(id=8, name="int8", bits=8, package=__name__, format_version=2)
