"""What the C library does with memory that is given up."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""mallopt(3), of glibc."""
MAPPED = 1 << 16
"""Blocks with pages of their own that there may be, by default."""
LARGEST = 1 << 25
"""Bytes of the largest block that glibc learns to keep by itself."""
LEAST = 1 << 20
"""Bytes of a block that has pages of its own."""


def give_back() -> None:
    """Have blocks of 1 MiB and more go back to the system as soon as they are given up, in this process from now on.

    glibc would soon keep those of up to 32 MiB for later, and as weights that come and go differ in size, it would keep
    more and more. Where there is another C library, nothing happens.
    """
    _tell((M_MMAP_THRESHOLD, LEAST))


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within, memory that is given up stays with the process, however large its blocks are, and goes back to the system
    in the end. From then on glibc keeps blocks of up to 32 MiB, as it learns to by itself; where there is another C
    library, nothing happens.

    A profile makes and drops tensors of tens of megabytes all the time, and each has new pages, which the system fills
    with zeros: what that costs is in docs/profiling.md.
    """
    _tell((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
    try:
        yield
    finally:
        _tell((M_MMAP_MAX, MAPPED), (M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, 2 * LARGEST))
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).malloc_trim(0)


def _tell(*settings: tuple[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        for name, value in settings:
            library.mallopt(name, value)
