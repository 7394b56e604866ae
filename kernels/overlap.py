"""Launches that begin while the one before them ends: programmatic dependent launch, of Hopper and later.

A kernel that is launched so calls `wait_for_previous` before it reads or writes what another one writes or reads, and
`let_next_begin` as early as it likes: the next one's programs then take what room there is, read tables that never
change, `fetch` what they will read, and wait. (CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization".)
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LEAST = (9, 0)
"""Compute capability."""


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """What a launch on the device needs beside its arguments: `OVERLAP` is a constant of the kernel, the other one an
    option of the launch."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST:
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """The next launch may begin as soon as all programs of this one have been here."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Until the launch before has ended, and all that it wrote can be seen."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def fetch(start, size):
    """Bring `size` bytes from the pointer `start` on (up to 15 less at either end, as it takes 16 at a time) into the
    second-level cache, without waiting for them. All memory accesses meet there: what another kernel writes after that
    is not missed. (PTX ISA, "cp.async.bulk.prefetch".)"""
    first = (start.to(tl.int64) + 15) // 16 * 16
    size = ((start.to(tl.int64) + size) // 16 * 16 - first).to(tl.int32)
    tl.inline_asm_elementwise(
        """{
        .reg .pred %one;
        .reg .b32 %thread;
        mov.u32 %thread, %tid.x;
        setp.eq.u32 %one, %thread, 0;
        setp.gt.and.s32 %one, $2, 0, %one;
        @%one cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [first, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
