"""What the C library does with memory that is given up."""

from __future__ import annotations

import contextlib
import ctypes

M_MMAP_THRESHOLD = -3
"""mallopt(3), of glibc."""
LEAST = 1 << 20
"""Bytes of a block that has pages of its own."""


def give_back() -> None:
    """Have blocks of 1 MiB and more go back to the system as soon as they are given up, in this process from now on.

    glibc would soon keep those of up to 32 MiB for later, and as weights that come and go differ in size, it would keep
    more and more. Where there is another C library, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LEAST)
