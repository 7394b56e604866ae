"""Honest times: alternating rounds in one run, medians, and the bandwidth of a plain copy beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLUSH = 256 << 20
"""Bytes written between two runs on a GPU, more than its L2 cache holds, so that every run reads from memory."""


def medians(calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of every call. The calls take turns, so that their ratios hold when the machine's speed drifts; a
    warm-up round is not counted."""
    timer = _gpu_seconds if device.type == "cuda" else _cpu_seconds
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            taken = timer(call)
            if number:
                found[name].append(taken)
    return {name: statistics.median(times) for name, times in found.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of a large tensor moves, reads and writes counted."""
    size = (2 << 30) if device.type == "cuda" else (256 << 20)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / medians({"copy": lambda: target.copy_(source)}, device, 9)["copy"]


def _cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Callable[[], Any]) -> float:
    torch.empty(FLUSH, dtype=torch.uint8, device="cuda").zero_()
    start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def wait(device: torch.device) -> None:
    """Until everything that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
