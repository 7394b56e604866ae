"""fp8: floats of 8 bits, 4 of them exponent and 3 mantissa (e4m3 without infinities, OCP 8-bit floating point 1.0), as
engines store them: no transform, a scale a group. Its id is 128 + 8, as 8 is that of int8."""

from __future__ import annotations

from kvcompile.kernels.codecs.base import Codec

CODEC = Codec(
    id=136, name="fp8", bits=8, package=__name__, format_version=3, needs_transform=False, profiled="", pack=1
)

LARGEST = 448.0
"""The largest number of the format."""
