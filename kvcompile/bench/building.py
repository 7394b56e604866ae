"""What `build` takes: seconds and memory for a known shape with random weights."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcompile.compiler import build

CACHE = "KVCOMPILE_CACHE"


@dataclass(frozen=True)
class BuildRow:
    """Seconds from a loaded model to the artifact's file, and of every stage by its name. `peak_bytes`: the most that
    the GPU held (on a CPU, the process), of which `model_bytes` are weights. `stopped`: the stage under way when time
    was up, or nothing."""

    seconds: float
    stages: dict[str, float]
    peak_bytes: int
    model_bytes: int
    stopped: str


class _TimeIsUpError(Exception):
    pass


def byte_tokenizer() -> Any:
    """A tokenizer with a token a byte, which needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*symbols, "<eos>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def measure_build(
    model: Any, *, mem: str = "25%", context: int | None = None, profile_tokens: int | None = None,
    limit: float = float("inf"),
) -> BuildRow:  # fmt: skip
    """Build from scratch, without a profile of earlier runs; at the first word of progress after `limit` seconds it is
    given up."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    entered: dict[str, float] = {}
    start, where = time.perf_counter(), ""

    def report(stage: str, done: int, total: int) -> None:
        nonlocal where
        now = time.perf_counter() - start
        entered.setdefault(stage, now)
        where = f"{stage}, {done} of {total}" if total else stage
        if now > limit:
            raise _TimeIsUpError

    stopped = ""
    with _own_cache() as folder:
        try:
            build(model, byte_tokenizer(), mem=mem, context=context, out=folder / "bench.kvb", name="random weights",
                  profile_tokens=profile_tokens, report=report)  # fmt: skip
        except _TimeIsUpError:
            stopped = where
    taken = time.perf_counter() - start
    starts = [*entered.values(), taken]
    stages = {name: after - before for name, before, after in zip(entered, starts, starts[1:], strict=False)}
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else _resident_peak()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return BuildRow(taken, stages, peak, weights, stopped)


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _own_cache() -> Iterator[Path]:
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(CACHE)
            if before is not None:
                os.environ[CACHE] = before
