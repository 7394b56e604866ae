"""How the GPU kernel is launched: a table, so that nobody waits for a search at the start."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tuning:
    """`block` slots a step of a program, its warps and stages, and programs on the whole device at a time."""

    block: int
    num_warps: int
    num_stages: int
    slots: int

    def programs(self, batch: int) -> int:
        """Items of one sequence, so that all sequences together fill the device once."""
        return max(1, self.slots // batch)


BLOCKS = {16: 64, 32: 64, 64: 128, 128: 64, 256: 32}
"""Slots a step by padded head size, so that a tile of keys is 16 KiB in 16 bits."""


def tuning(device: torch.device, head_dim: int, dtype: torch.dtype, batch: int) -> Tuning:
    """The entry for a device and a shape."""
    padded = next(size for size in BLOCKS if size >= head_dim)
    block = BLOCKS[padded] // (2 if dtype == torch.float32 else 1)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return Tuning(block, 4, 3, 4 * processors)
