"""The masks that transformers makes for models with an attachment, and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.masking_utils import sdpa_mask

from kvcompile.artifacts import CacheError

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


def real_tokens(mask: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """Which new tokens are no padding, bool [B, T], by their mask bool [1 or B, 1, T, T]; None: all of them.

    Padding is seen by no query, so a token that does not see itself is padding.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise CacheError("a ragged cache takes a boolean attention mask, or a 2D mask of ones and zeros")
    real = mask.expand(batch, -1, -1, -1)[:, 0].diagonal(dim1=-2, dim2=-1)
    return None if bool(real.all()) else real
