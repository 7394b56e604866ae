"""Kernels compiled side by side: what is interrupted or fails is compiled again."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from kvcompile.kernels import HeadSpec, LayerLayout
from kvcompile.kernels.compiling import compiles, compiling, launch

pytest.importorskip("triton")
import triton
from triton.runtime import _async_compile


@pytest.fixture
def layout() -> LayerLayout:
    return LayerLayout.from_heads([HeadSpec("recent", 8, 4, 4)])


def kernel(cache: dict[str, Any]) -> Any:
    """A kernel that is in `cache` as Triton has those of a device."""
    return SimpleNamespace(warmup=lambda *_, grid: None, device_caches={0: (cache, None)})


def future(found: Any) -> Any:
    done: Future[Any] = Future()
    one = triton.FutureKernel(lambda kernel: None, done)
    one.kernel = found
    return one


def test_what_is_interrupted_is_begun_anew(layout: LayerLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C while compilers are waited for, after which Triton 3.6 and 3.7 say that they are still at it."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(triton.AsyncCompileMode, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt), compiling(layout, "x"):
            assert compiles()
    assert not compiles()
    assert _async_compile.active_mode.get() is None
    with compiling(layout, "x") as needed:
        assert needed
    with compiling(layout, "x") as needed:
        assert not needed


def test_what_cannot_be_compiled_is_tried_again_when_it_is_launched(layout: LayerLayout) -> None:
    fine = future("a kernel")
    cache = {"one": fine, "two": future(None), "three": "compiled before"}
    with compiling(layout, "y"):
        launch(kernel(cache), (1,))
    assert cache == {"one": fine, "three": "compiled before"}
