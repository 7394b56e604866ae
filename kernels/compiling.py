"""GPU kernels compiled side by side, before the first of them is launched.

Triton compiles a kernel when it is first launched, and a plan wants dozens: one for every set of codecs that a layer
has. One after the other they take minutes, on the first run of a plan on a machine; the compiler lets go of Python's
lock, so that threads take what they take on as many cores.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from kvcompile.kernels.layout import LayerLayout

THREADS = 16
"""Most compilers at a time: each takes some hundred megabytes."""

_COMPILES: ContextVar[dict[int, Any] | None] = ContextVar("kvcompile compiles kernels", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel of Triton, or within `compiling` compile it for these arguments."""
    if (kernels := _COMPILES.get()) is not None:
        kernels[id(kernel)] = kernel
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


def compiles() -> bool:
    """Whether launches are within `compiling`."""
    return _COMPILES.get() is not None


@contextmanager
def compiling(layout: LayerLayout, *what: Hashable) -> Iterator[bool]:
    """Launches inside compute nothing, and all of their kernels are compiled at the end. One that cannot be compiled
    says so when it is launched. Gives False where the same (`what`, for a model whose first layer has this `layout`)
    was done before."""
    key = ("compiled", *what)
    if key in layout.memo:
        yield False
        return
    import triton
    from triton.runtime import _async_compile

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, kernels = ThreadPoolExecutor(min(THREADS, cores)), dict[int, Any]()
    before = _COMPILES.set(kernels)
    try:
        with triton.AsyncCompileMode(threads, ignore_errors=True):
            yield True
    finally:
        _COMPILES.reset(before)
        threads.shutdown(wait=False, cancel_futures=True)
        _async_compile.active_mode.set(None)  # Triton leaves it where it is interrupted while it waits
        for kernel in kernels.values():
            _forget_failed(kernel, _async_compile.FutureKernel)
    layout.memo[key] = True


def _forget_failed(kernel: Any, future: type) -> None:
    """Have Triton 3.7 compile a kernel anew that could not be compiled, in place of raising what was raised then."""
    for known, *_ in getattr(kernel, "device_caches", {}).values():  # the interpreter has none
        for key in [key for key, found in known.items() if isinstance(found, future) and found.kernel is None]:
            del known[key]
