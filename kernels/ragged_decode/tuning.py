"""How the GPU kernel is launched: a table, so that nobody waits for a search at the start."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tuning:
    """`block` slots a step of a program, its warps and stages, and how many programs a processor has at a time."""

    block: int
    num_warps: int
    num_stages: int
    programs: int


TABLE = {
    64: Tuning(128, 4, 3, 4),
    128: Tuning(64, 4, 3, 4),
    256: Tuning(32, 4, 3, 4),
}
"""By head size, the next larger one for those between. A tile of keys is 16 KiB in 16 bits."""


def entry(head_dim: int, dtype: torch.dtype) -> Tuning:
    """The line for a shape; float32 takes half the slots a step."""
    chosen = TABLE[min(size for size in TABLE if size >= head_dim)]
    if dtype == torch.float32:
        return Tuning(chosen.block // 2, chosen.num_warps, 2, chosen.programs)
    return chosen


def items_of(chosen: Tuning, device: torch.device, batch: int) -> int:
    """Work items of one sequence, so that all sequences together fill the device once."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, chosen.programs * processors // batch)
