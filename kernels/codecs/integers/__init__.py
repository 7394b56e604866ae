"""The arithmetic that the codecs of whole numbers share (int8 to int2, and mix3 to mix1, which have several widths).

An element's code is one of -2^(b-1) ... 2^(b-1) - 1, stored with 2^(b-1) added. It reads as the middle of its interval,
(c + 1/2) s for the scale s of its group, so that all 2^b levels are used and lie symmetrically about 0.

With z = x / max|x| for a group x, its codes are c = floor(z 2^(b-1) / f), limited to the range, for that step f of
`steps` for which the levels c + 1/2 have the largest cosine with x; among all codes those with the largest cosine are
of this form for some f. (RaBitQ, arXiv 2409.09913, has that for unit vectors, and the second of the scales below.)

The scale is then s^2 = <x, x> / <c + 1/2, c + 1/2>, by which what is read has the norm of x, or for codecs that leave
elements out s = <x, x> / <x, c + 1/2>, by which its product with x is <x, x>; rounded to float16 and at least its
smallest normal number 2^-14. The scale of the least squared error is smaller than both, and makes products too small
just with the queries that x is for. Which is best was measured: docs/results.md, "Codes and scales".
"""

from __future__ import annotations

from kvcompile.kernels.codecs.base import EIGHTHS


def steps(bits: int) -> tuple[float, ...]:
    """The steps between codes of `bits` bits that are tried, as shares of the largest magnitude over 2^(bits-1)."""
    # Fewer codes gain more from a step that lets the largest elements be limited. Of 8 bits there are enough.
    return tuple(0.4 + 0.1 * (bits + i) for i in range(5)) if bits < 8 else (1.0,)


LESS = 2.0**-16
"""By so much, as a share, does each step of `steps` count less than the one before. Two steps can give the same cosine,
or the same codes: then rounding would choose, which differs between implementations."""


def keeps_norm(sections: tuple[tuple[int, int], ...]) -> bool:
    """Whether a scale is chosen to keep the norm, where all elements are stored, or the product. `sections` are those
    of a `Codec`."""
    return not sections or sum(eighths for _, eighths in sections) == EIGHTHS
