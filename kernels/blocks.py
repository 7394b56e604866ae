"""Rows as float32, a block at a time: what is multiplied is then still in the processor's cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch

BLOCK = 1 << 19
"""Most numbers that are converted to float32 at a time."""


class Scratch(threading.local):
    """Memory of a thread for numbers that are needed at once and never again."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(self, name: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the shape of `like`, of any contents."""
        key = (name, dtype, like.device)
        held = self.held.get(key)
        if held is None or held.numel() < like.numel():
            with torch.inference_mode(False):  # else nothing outside of that mode could write to it later
                held = self.held[key] = torch.empty(max(like.numel(), BLOCK), dtype=dtype, device=like.device)
        return held[: like.numel()].view(like.shape)


scratch = Scratch()


def ranges(rows: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Rows [B, n, X] as they are, some at a time: first, after the last, and the rows."""
    step = max(1, BLOCK // (rows.shape[0] * rows.shape[2]))
    for start in range(0, rows.shape[1], step):
        block = rows[:, start : start + step]
        yield start, start + block.shape[1], block


def blocks(rows: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Rows [B, n, X] as float32, some at a time: first, after the last, and the rows, which the next
    block overwrites."""
    for start, stop, block in ranges(rows):
        yield start, stop, scratch.get("rows", block, torch.float32).copy_(block)
