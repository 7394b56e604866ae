"""A GGUF file's table of contents, taken apart once and quickly: a vocabulary has hundreds of thousands of entries."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np


def _faster(kind: Any) -> Any:
    """A `gguf.GGUFReader` three times as fast: every slice of what it maps is a plain array, not another `memmap`."""

    class Reader(kind):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._mapped, self._plain = mapped, np.asarray(mapped)

        def forget(self) -> None:
            """Let go of the pages of the file: as long as they are there they count as this process's memory."""
            with contextlib.suppress(AttributeError, OSError, ValueError):
                self._mapped._mmap.madvise(mmap.MADV_DONTNEED)

    return Reader


@contextlib.contextmanager
def one_reader() -> Iterator[None]:
    """Within, a GGUF file gets one reader, whoever asks `gguf` for it, and that reader can `forget`: transformers makes
    one each for the configuration, the tokenizer and the names of the weights. Without that package nothing is changed,
    and asking for a reader fails as it would."""
    try:
        import gguf
    except ImportError:
        yield
        return
    before, made = gguf.GGUFReader, dict[str, Any]()
    kind = _faster(before)

    def reader(path: os.PathLike[str] | str) -> Any:
        name = os.path.realpath(path)
        if name not in made:
            made[name] = kind(path)
        return made[name]

    gguf.GGUFReader = reader
    try:
        yield
    finally:
        gguf.GGUFReader = before
