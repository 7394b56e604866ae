"""int3: 8 levels symmetric about 0; `integers/packing.py` says how their bits lie in bytes."""

from __future__ import annotations

from kvcompile.kernels.codecs.base import Codec

CODEC = Codec(id=3, name="int3", bits=3, package=__name__, format_version=3, profiled="v", pack=8)
