"""Memory that is given up goes back to the system, at once or in the end."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT, SIZE = 16, 8 << 20
BLOCKS = """
import ctypes, os, sys

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def block(size):
    found = c.malloc(size)
    ctypes.memset(found, 1, size)
    return found
"""
PROGRAM = f"""
if sys.argv[1] == "give back":
    from kvcompile.models.allocator import give_back
    give_back()

c.free(block(2 * {SIZE}))  # from which glibc learns to keep what is smaller
held = [block({SIZE}) for _ in range({COUNT})]
before = resident()
for one in held[::2]:
    c.free(one)
print(before - resident())
"""
KEPT = f"""
from kvcompile.models.allocator import kept
with kept():
    c.free(block({COUNT} * {SIZE}))
    inside = resident()
print(inside - resident())
"""


def given_back(program: str, how: str = "") -> int:
    """Bytes that leave: when every second block is freed, or at the end of `kept`."""
    command = [sys.executable, "-c", BLOCKS + program, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read off /proc")
def test_what_is_given_up_leaves_the_process() -> None:
    freed = COUNT // 2 * SIZE
    if given_back(PROGRAM, "keep") > freed // 2:
        pytest.skip("this C library keeps nothing")
    assert given_back(PROGRAM, "give back") > 0.9 * freed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library does as it likes")
def test_what_is_kept_leaves_in_the_end() -> None:
    assert given_back(KEPT) > 0.9 * COUNT * SIZE
