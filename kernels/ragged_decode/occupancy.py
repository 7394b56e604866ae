"""How many programs of a compiled kernel a processor of the GPU holds at a time, as the driver has it."""

from __future__ import annotations

import ctypes
from functools import cache

CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT (CUDA driver API, CUfunction_attribute)."""


def resident(function: int, threads: int, shared: int) -> int:
    """Programs of `threads` threads and `shared` bytes; `function` is the handle of the loaded kernel. As much of a
    processor's first-level cache as can be becomes shared memory: nothing is read twice.

    Raises:
        RuntimeError: the driver refused.
    """
    found, handle = ctypes.c_int(), ctypes.c_void_p(function)
    _done(_driver().cuFuncSetAttribute(handle, CARVEOUT, 100))
    ask = _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor
    _done(ask(ctypes.byref(found), handle, threads, ctypes.c_size_t(shared)))
    return max(1, found.value)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _done(status: int) -> None:
    if status:
        raise RuntimeError(f"the CUDA driver refused to say how many programs fit a processor: error {status}")
