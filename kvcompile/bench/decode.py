"""Decoding end to end: a model with its ragged cache beside the same model with transformers' full cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvcompile.artifacts import Artifact
from kvcompile.bench.subjects import fill_randomly
from kvcompile.bench.timing import copy_bandwidth, wait

CHUNK = 8
"""Steps between two looks at the clock."""
WARM_UP = 4


@dataclass(frozen=True)
class DecodeRow:
    """One method: `cache_bytes`, median seconds a step of all sequences, tokens a second of all together, what share of
    the copy bandwidth reading weights and cache once takes, and how often a step waits for the host (None: unknown)."""

    method: str
    cache_bytes: int
    seconds: float
    tokens_per_second: float
    of_copy: float
    host_syncs: int | None


def measure_decode(model: Any, plan: Artifact, batch: int, context: int, tokens: int) -> list[DecodeRow]:
    """Time at least `tokens` steps after `context` tokens, both methods in turn; caches hold random numbers."""
    from kvcompile.runtime import Decoder, attach

    device = model.device
    kv = attach(model, plan)
    try:
        ragged = kv.new_cache(batch)
        fill_randomly(ragged, context)
        decoder = Decoder(model, ragged)
        decoder.start(torch.ones(batch, 1, dtype=torch.int64, device=device), context)
        full, step_full = _full_cache(model, batch, context, WARM_UP + tokens + CHUNK)
        steps: dict[str, Callable[[], Any]] = {"transformers, full cache": step_full, "kvcompile": decoder.step}
        times: dict[str, list[float]] = {name: [] for name in steps}
        with torch.inference_mode():
            for step in steps.values():
                for _ in range(WARM_UP):
                    step()
            for _ in range(-(-tokens // CHUNK)):
                for name, step in steps.items():
                    wait(device)
                    start = time.perf_counter()
                    for _ in range(CHUNK):
                        step()
                    wait(device)
                    times[name].append((time.perf_counter() - start) / CHUNK)
            syncs = {name: _host_syncs(step, device) for name, step in steps.items()}
            copy = copy_bandwidth(device)
    finally:
        kv.detach()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= model.get_input_embeddings().weight.numel() * model.dtype.itemsize * (not _tied(model))
    sizes = {"transformers, full cache": full, "kvcompile": ragged.nbytes}
    found = []
    for name, taken in times.items():
        seconds = statistics.median(taken)
        moved = (weights + sizes[name]) / seconds
        found.append(DecodeRow(name, sizes[name], seconds, batch / seconds, moved / copy, syncs[name]))
    return found


def _tied(model: Any) -> bool:
    """Whether the embedding is the last layer's matrix too, and so read as a whole in every step."""
    return bool(model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr())


def _full_cache(model: Any, batch: int, context: int, steps: int) -> tuple[int, Callable[[], Any]]:
    """Bytes and a step of the model with a cache of `context` random tokens: on a GPU transformers' static cache with
    the step recorded as a CUDA graph, on a CPU its dynamic one."""
    from transformers import DynamicCache, StaticCache

    device, token = model.device, torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    position = torch.full((batch, 1), context, dtype=torch.int64, device=device)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, context, head_dim)
    cache: Any
    if device.type == "cuda":
        cache = StaticCache(config=config, max_cache_len=context + steps)
        with torch.inference_mode():
            model(token, position_ids=position, past_key_values=cache)
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
    else:
        cache = DynamicCache(config=config)
        for number in range(config.num_hidden_layers):
            cache.update(torch.randn(shape, dtype=model.dtype), torch.randn(shape, dtype=model.dtype), number)

    def step() -> None:
        logits = model(token, position_ids=position, past_key_values=cache).logits
        token.copy_(logits[:, -1].argmax(-1)[:, None])
        position.add_(1)

    size = 2 * config.num_hidden_layers * torch.Size(shape).numel() * model.dtype.itemsize
    if device.type != "cuda":
        return size, step
    with torch.inference_mode():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return size, graph.replay


def _host_syncs(step: Callable[[], Any], device: torch.device) -> int | None:
    """How often one step waits for the device, by the profiler."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
    names = [event.name for event in found.events()]
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")
    # The profiler itself waits once at its end.
    counted: int = sum(name.startswith(waits) for name in names) - names.count("cudaDeviceSynchronize")
    return max(counted, 0)
