"""Honest times: recorded runs over cold memory, in turn, medians, and the bandwidth of a plain copy beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Calls = Callable[[], Any] | Sequence[Callable[[], Any]]
"""What is timed: one call, or several of the same kind over memory of their own, which are run one after another."""

ROTATION = 1 << 30
"""Bytes that the calls of one method go through on a GPU, 16 times and more what its L2 cache holds, so that none finds
its data there."""
MOST_STORES = 128
_FLUSH = 512 << 20
"""Bytes that are read between two samples. Writing them would leave lines to be written back in the next sample."""


def stores_for(size: int, device: torch.device) -> int:
    """How many stores of `size` bytes a method has to go through in turn."""
    return 1 if device.type != "cuda" else min(MOST_STORES, max(1, -(-ROTATION // max(size, 1))))


def medians(
    calls: Mapping[str, Calls], device: torch.device, rounds: int, *, recorded: bool = True
) -> dict[str, float]:
    """Median seconds of one call of each kind. The kinds take turns, so that their ratios hold when the machine's speed
    drifts; a warm-up round is not counted.

    On a GPU the calls of a kind are `recorded` as one CUDA graph, so that neither Python nor launching counts; what
    cannot be recorded is timed with them.
    """
    on_gpu = device.type == "cuda"
    several = {name: list(one) if isinstance(one, Sequence) else [one] for name, one in calls.items()}
    runs = {name: record(one) if on_gpu and recorded else _in_turn(one) for name, one in several.items()}
    timer = _GpuTimer(device) if on_gpu else _cpu_seconds
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = timer(run) / len(several[name])
            if number:
                found[name].append(taken)
    return {name: statistics.median(times) for name, times in found.items()}


def record(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """The calls as one CUDA graph, warmed up; what they return is dropped."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and tables made here, which a recording does not allow
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy of a large tensor moves, reads and writes counted."""
    size, rounds = (2 << 30, 9) if device.type == "cuda" else (128 << 20, 5)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    # Not recorded: inside a graph, the same copy takes 1.6 times as long (H200, CUDA 13.0).
    return 2 * size / medians({"copy": lambda: target.copy_(source)}, device, rounds, recorded=False)["copy"]


def wait(device: torch.device) -> None:
    """Until everything that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class _GpuTimer:
    """Seconds between two events. The device is busy reading when the run is launched, so launching is not timed."""

    def __init__(self, device: torch.device) -> None:
        self.read = torch.zeros(_FLUSH // 4, dtype=torch.float32, device=device)

    def __call__(self, run: Callable[[], Any]) -> float:
        self.read.sum()
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
