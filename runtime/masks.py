"""The masks that transformers makes for models with an attachment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.masking_utils import sdpa_mask

_left_out: ContextVar[bool] = ContextVar("kvcompile_masks_left_out", default=False)


def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """As for transformers' own `sdpa`; none where they are left out."""
    if _left_out.get():
        return None
    made: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return made


@contextmanager
def left_out() -> Iterator[None]:
    """Within, no masks are made: of a long prompt they would take more memory than anything else."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)
