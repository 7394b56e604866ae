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

_COMPILES: ContextVar[bool] = ContextVar("kvcompile compiles kernels", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel of Triton, or within `compiling` compile it for these arguments."""
    if compiles():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


def compiles() -> bool:
    """Whether launches are within `compiling`."""
    return _COMPILES.get()


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

    before = _COMPILES.set(True)
    try:
        with (
            ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as threads,
            triton.AsyncCompileMode(threads, ignore_errors=True),
        ):
            yield True
    finally:
        _COMPILES.reset(before)
    layout.memo[key] = True
