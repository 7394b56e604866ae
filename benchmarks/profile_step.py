"""Where the time of a call goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MOST = 25


def kernel_times(call: Callable[[], Any], times: int) -> list[dict[str, Any]]:
    """Microseconds and launches a call, by kernel, the longest first; on a machine without a GPU, by operation."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(times):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    rows = [
        {"name": one.key, "us": (one.self_device_time_total if on_gpu else one.self_cpu_time_total) / times,
         "launches": one.count / times}
        for one in found.key_averages()
    ]  # fmt: skip
    return sorted((row for row in rows if row["us"]), key=lambda row: -row["us"])[:MOST]
