"""How much memory there is, what a model takes of it, and what is then left."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcompile.artifacts import feed_forward_elements
from kvcompile.models.arithmetic import fast_dtype
from kvcompile.models.resident import is_streamed
from kvcompile.runtime.parts import decoder_of

PROGRAM = 800_000_000
"""Bytes that Python, torch, transformers and a tokenizer take, and that the allocator keeps between steps."""

SPARE = 0.9
"""Of what is free, the part that is counted on: other programs run too."""

UNKNOWN = 4 << 30
"""Bytes that are taken to be free where the system does not say."""

ROWS = 128
"""Rows of attention that are looked at together, of all heads."""

LOGITS = 1 << 24
"""Elements of the logits that are looked at together."""


@dataclass(frozen=True)
class Room:
    """Bytes for what is held between the steps of a profile: on the device where the model computes, where that has a
    memory of its own, and in this machine's memory. `ample`: there are as many again, for what is given up and not yet
    used again."""

    device: int
    host: int
    ample: bool = False


def free_bytes(device: torch.device) -> int:
    """Memory that is free for a process on `device`: for the CPU what Linux says is available, within the limit of the
    control group, and `UNKNOWN` where there is no such file."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [_available(), _group_room()]
    return int(min(known))


def room(model: Any, device: torch.device, memory: int | None, tokens: int) -> Room:
    """What is left for states where a profile takes `memory` bytes in all (None: what is free) for contexts of `tokens`
    tokens and what follows them."""
    work = working(model.config.get_text_config(), 2 * tokens, model.dtype.itemsize)
    parts = [model.get_input_embeddings(), *decoder_of(model).layers, model.get_output_embeddings()]
    streamed, cpu = is_streamed(parts[0]), torch.device("cpu")
    # Of a streamed model one part is there at a time. One that is held whole is no longer free memory.
    weights = max(_bytes(part, device) for part in parts) if streamed else _bytes(model, device)
    to_come = work + (weights if streamed else 0)
    if device.type == "cpu":
        if memory is not None:
            return Room(0, max(memory - PROGRAM - work - weights, 0))
        free = max(int(SPARE * free_bytes(cpu)) - to_come, 0)
        return Room(0, free) if streamed else Room(0, free // 2, ample=True)
    # Half, as the device's allocator keeps blocks that it does not use.
    there = max(int(SPARE * free_bytes(device)) - to_come, 0) // 2
    if memory is None:
        return Room(there, int(SPARE * free_bytes(cpu)))
    allowed = max(memory - PROGRAM, 0)
    return Room(min(there, allowed), allowed - min(there, allowed))


def fits(weights: int, config: Any, itemsize: int, device: torch.device, memory: int, tokens: int) -> bool:
    """Whether `weights` bytes of a model can be held whole while it is profiled within `memory` bytes, and on a device
    with its own memory, within that."""
    work = working(config, 2 * tokens, itemsize)
    if device.type == "cpu":
        return PROGRAM + weights + work <= memory
    return weights + work <= min(memory, SPARE * free_bytes(device))


def working(config: Any, tokens: int, itemsize: int) -> int:
    """About how many bytes a step of profiling takes beside weights and states, for a sequence of so many tokens."""
    heads, width = config.num_attention_heads, config.hidden_size
    inner = feed_forward_elements(config) if getattr(config, "intermediate_size", None) else 12 * width
    # The scorer's normal equations three times in float32 and twice in float64, where they are solved.
    solving = (3 * 4 + 2 * 8) * (width + 1) ** 2
    attention = 6 * 4 * ROWS * heads * tokens
    layer = tokens * (inner + 6 * width) * itemsize
    logits = 4 * 4 * LOGITS
    return int(max(solving, attention + layer, logits))


def weight_bytes(numel: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of so many weights in the element type that `device` computes in."""
    return numel * fast_dtype(dtype, device).itemsize


def _bytes(module: Any, device: torch.device) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}.values()
    return sum(weight_bytes(t.numel(), t.dtype, device) for t in tensors)


def _available() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return UNKNOWN


def _group_room() -> float:
    """What the control group still allows; its page cache is given up when memory is short."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            stat = (folder / "memory.stat").read_text().splitlines()
            cache = next(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
            return max(int(limit) - int((folder / "memory.current").read_text()) + cache, 0)
    return float("inf")
