"""Memory that is given up goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT, SIZE = 16, 8 << 20
PROGRAM = f"""
import ctypes, os, sys

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "give back":
    from kvcompile.models.allocator import give_back
    give_back()
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def block(size):
    found = c.malloc(size)
    ctypes.memset(found, 1, size)
    return found

c.free(block(2 * {SIZE}))  # from which glibc learns to keep what is smaller
held = [block({SIZE}) for _ in range({COUNT})]
before = resident()
for one in held[::2]:
    c.free(one)
print(before - resident())
"""


def given_back(how: str) -> int:
    """Bytes that leave when every second block is freed."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read off /proc")
def test_what_is_given_up_leaves_the_process() -> None:
    freed = COUNT // 2 * SIZE
    if given_back("keep") > freed // 2:
        pytest.skip("this C library keeps nothing")
    assert given_back("give back") > 0.9 * freed
