"""Decoding end to end: a model with its ragged cache beside the same model with transformers' full cache."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.artifacts import Artifact, CacheError
from kvcompile.bench.full_step import Step, full_step
from kvcompile.bench.subjects import fill_randomly
from kvcompile.bench.timing import copy_bandwidth, wait

CHUNK = 8
"""Steps between two looks at the clock."""
WARM_UP = 4
FULL, OURS = "transformers, full cache", "kvcompile"


@dataclass(frozen=True)
class DecodeRow:
    """One method: `cache_bytes`, median seconds a step of all sequences, tokens a second of all together, what share of
    the copy bandwidth reading weights and cache once takes, and how often a step waits for the host (None: unknown).
    `recorded`: whether a step is one CUDA graph (None: on a CPU). `peak_bytes`: the most that the GPU held, the model
    and all methods under way counted (0: on a CPU)."""

    method: str
    cache_bytes: int
    seconds: float
    tokens_per_second: float
    of_copy: float
    host_syncs: int | None
    recorded: bool | None
    peak_bytes: int


def measure_decode(model: Any, plan: Artifact, batch: int, context: int, tokens: int) -> list[DecodeRow]:
    """Time at least `tokens` steps after `context` tokens, both methods in turn; caches hold random numbers."""
    with ExitStack() as stack:
        # Ours last: attaching it decides which attention the model calls, and takes other caches too.
        steps = {
            FULL: stack.enter_context(full_step(model, batch, context, steps_of(tokens))),
            OURS: stack.enter_context(ragged_step(model, plan, batch, context)),
        }
        return time_steps(model, steps, batch, tokens)


def steps_of(tokens: int) -> int:
    """How many steps `time_steps` takes for `tokens` timed ones."""
    return WARM_UP + -(-tokens // CHUNK) * CHUNK + 1


@contextmanager
def ragged_step(model: Any, plan: Artifact, batch: int, context: int) -> Iterator[Step]:
    """A step of the decode loop after `context` tokens, with a store of random numbers.

    Raises:
        CacheError: on a GPU, a loop that has not recorded its step after the second.
    """
    from kvcompile.runtime import Decoder, attach

    with attach(model, plan) as kv, torch.inference_mode():
        cache = kv.new_cache(batch)
        fill_randomly(cache, context)
        decoder = Decoder(model, cache)
        decoder.start(torch.ones(batch, 1, dtype=torch.int64, device=model.device), context)
        recorded = None
        if model.device.type == "cuda":
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                decoder.step()
                decoder.step()
            recorded = decoder.recorded
            if not recorded:
                why = "; ".join(str(one.message) for one in heard) or "nothing said why"
                raise CacheError(f"the decode loop has not recorded its second step: {why}")
        yield Step(cache.nbytes, decoder.step, recorded)


@torch.inference_mode()
def time_steps(model: Any, steps: Mapping[str, Step], batch: int, tokens: int) -> list[DecodeRow]:
    """Time at least `tokens` steps of every method, `CHUNK` at a time in turn, and a copy's bandwidth after them."""
    device = model.device
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARM_UP):
            step.run()
    for _ in range(-(-tokens // CHUNK)):
        for name, step in steps.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(CHUNK):
                step.run()
            wait(device)
            times[name].append((time.perf_counter() - start) / CHUNK)
    syncs = {name: host_syncs(step.run, device) for name, step in steps.items()}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    copy, weights, found = copy_bandwidth(device), weight_bytes(model), []
    for name, taken in times.items():
        seconds, size = statistics.median(taken), steps[name].cache_bytes
        of_copy = (weights + size) / seconds / copy
        found.append(
            DecodeRow(name, size, seconds, batch / seconds, of_copy, syncs[name], steps[name].recorded, peak)
        )  # fmt: skip
    return found


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a step reads: all but the embedding, of which it reads a row a token."""
    weights: int = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    # Where it is the last layer's matrix too, it is read as a whole in every step.
    tied = embedding.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    return weights if tied else weights - embedding.numel() * embedding.element_size()


def host_syncs(step: Callable[[], Any], device: torch.device) -> int | None:
    """How often one step waits for the device, by torch's own account."""
    if device.type != "cuda":
        return None
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("called a synchronizing" in str(one.message) for one in heard)
