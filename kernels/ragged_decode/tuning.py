"""How the GPU kernel is launched: a table, so that nobody waits for a search at the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tuning:
    """`block` slots a step of a program, its warps and stages, how many programs a processor is taken to hold where it
    cannot be asked (`resident`), and the most items of a head."""

    block: int
    num_warps: int
    num_stages: int
    programs: int
    most: int = 16


TABLE = {
    64: Tuning(64, 1, 3, 8, 32),
    128: Tuning(32, 1, 3, 8, 32),
    256: Tuning(16, 1, 3, 8, 32),
}
"""By head size, the next larger one for those between. A program is one warp: a second one would exchange logits
through shared memory, and a processor holds several programs anyhow."""


def entry(head_dim: int, dtype: torch.dtype) -> Tuning:
    """The line for a shape; float32 takes half the slots a step."""
    chosen = TABLE[min(size for size in TABLE if size >= head_dim)]
    if dtype == torch.float32:
        return Tuning(max(16, chosen.block // 2), chosen.num_warps, 2, chosen.programs, chosen.most)
    return chosen


MOST_RESIDENT = 32
"""Programs that a processor holds at the most (sm_80 and sm_90; CUDA C++ programming guide, compute capabilities)."""


def resident(registers: int, shared: int, num_warps: int, device: Any) -> int:
    """Programs that one processor of `device` (its properties, as torch has them) holds at a time, by `registers` a
    thread, `shared` bytes a program, and threads (CUDA C++ best practices guide, occupancy)."""
    a_warp = -(-registers * 32 // 256) * 256  # registers are given to warps, 256 at a time
    by_registers = device.regs_per_multiprocessor // (a_warp * num_warps)
    by_shared = device.shared_memory_per_multiprocessor // (shared + 1024)  # the system keeps 1 KiB a program
    by_threads = device.max_threads_per_multi_processor // (32 * num_warps)
    return max(1, min(by_registers, by_shared, by_threads, MOST_RESIDENT))


def items_of(programs: int, device: torch.device, batch: int) -> int:
    """Work items of one sequence, so that all sequences together fill the device once, with `programs` a processor. In
    the interpreter there is nothing to fill, and every program takes its time."""
    if device.type != "cuda":
        return max(1, programs // 2)
    return max(1, programs * torch.cuda.get_device_properties(device).multi_processor_count // batch)
