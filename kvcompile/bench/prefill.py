"""Prefill: what the cut and the compiled scorer cost, as ratios in one run, and long prompts in chunks."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from kvcompile.artifacts import Artifact
from kvcompile.bench.timing import medians, wait


def measure_prefill(model: Any, plan: Artifact, batch: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds to read `tokens` tokens with a full cache, with the artifact, and with the artifact but every
    token scoring 0; the three take turns."""
    from transformers import DynamicCache

    from kvcompile.runtime import attach
    from kvcompile.runtime.layer_scorer import LayerScorer

    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)

    def read(cache: Any) -> None:
        model(ids, past_key_values=cache, logits_to_keep=1)

    def unscored() -> None:
        with patch.object(LayerScorer, "__call__", _nothing):
            read(kv.new_cache(batch))

    with attach(model, plan) as kv, torch.inference_mode():
        calls = {
            "full cache": lambda: read(DynamicCache(config=model.config)),
            "artifact without its scorer": unscored,
            "artifact": lambda: read(kv.new_cache(batch)),
        }
        return medians(calls, model.device, rounds, recorded=False)


def _nothing(scorer: Any, hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*hidden.shape[:2], len(scorer.bias), device=hidden.device)


@dataclass(frozen=True)
class ChunkedRow:
    """Reading long prompts in chunks: `seconds`, and the most that the GPU held (0: on a CPU), of which `model_bytes`
    are weights and `cache_bytes` the ragged cache."""

    seconds: float
    peak_bytes: int
    model_bytes: int
    cache_bytes: int


def chunks_are_offered() -> bool:
    """Whether this runtime reads a prompt in chunks."""
    from kvcompile.runtime import Decoder

    return "prefill_chunk" in inspect.signature(Decoder.prefill).parameters


def measure_chunked(model: Any, plan: Artifact, batch: int, tokens: int, chunk: int) -> ChunkedRow:
    """Read `batch` prompts of `tokens` random tokens, `chunk` at a time, once: kernels that are compiled on the way
    count, as they do for a user."""
    from kvcompile.runtime import Decoder, attach

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)
    on_gpu = model.device.type == "cuda"
    with attach(model, plan) as kv, torch.inference_mode():
        cache = kv.new_cache(batch)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(model.device)
        wait(model.device)
        start = time.perf_counter()
        prefill: Any = Decoder(model, cache).prefill
        prefill(ids, prefill_chunk=chunk)
        wait(model.device)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else 0
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        return ChunkedRow(seconds, peak, weights, cache.nbytes)
