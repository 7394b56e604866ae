"""The C sources that a profile on a CPU needs, in the order in which it comes to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvcompile.kernels.dispatch import CHOICE
from kvcompile.kernels.native import back, build, effects, errors, gradient, peaks, prompt

SOURCES = (prompt.SOURCE, peaks.SOURCE, errors.SOURCE, back.SOURCE, effects.SOURCE, gradient.SOURCE)


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Within, they are compiled beside what the block does, such as loading the model. Where there is a GPU, or
    kernels are chosen by hand, none is."""
    needed = not torch.cuda.is_available() and os.environ.get(CHOICE, "") == ""
    with build.ahead(SOURCES if needed else ()):
        yield
