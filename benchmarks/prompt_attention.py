"""Exact attention of prompts on a CPU, in C beside torch's.

    python benchmarks/prompt_attention.py [--rounds 7] [--processor] [--model NAME --artifact FILE.kvb]

Whole prompts (torch: its flash attention), chunks of 512 tokens (torch: with masks, in blocks) and follow-ups of 128
tokens after a context of 2,048 of which an eighth is kept (likewise). The two take turns, so that ratios hold on a
machine that others use; `--processor` counts the processor's time in place of the clock's, with one thread. With a
model and an artifact, a forward pass over `--tokens` tokens too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kvcompile.artifacts import read
from kvcompile.kernels import prompt_attention
from kvcompile.kernels.dispatch import CHOICE
from kvcompile.models import load
from kvcompile.runtime import attach

SHAPES = {"SmolLM2-135M, 9/3 x 64": (9, 3, 64), "Qwen2.5-0.5B, 14/2 x 64": (14, 2, 64), "12/2 x 128": (12, 2, 128)}
WHOLE, CHUNK, FOLLOW_UP = (512, 2048, 8192), (512, 8192), (128, 2048)
KEPT = 1 / 8
LEAST = 0.05
"""Seconds of a sample: short calls are repeated."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most", type=int, default=8192, help="longest prompt")
    parser.add_argument("--processor", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    if args.processor:
        torch.set_num_threads(1)
    print(f"{torch.get_num_threads()} threads, milliseconds\n{'':<60} torch       C   torch / C")
    for dtype in filter(None, args.dtypes.split(",")):
        for shape, sizes in SHAPES.items():
            for name, call in attentions(*sizes, getattr(torch, dtype), args.most):
                report(f"{shape}, {dtype}, {name}", call, args)
    if args.model:
        report(f"{args.model}, {args.tokens} tokens", forward_pass(args), args)


def attentions(
    num_heads: int, heads: int, dim: int, dtype: torch.dtype, most: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    generator = torch.Generator().manual_seed(0)

    def call(length: int, columns: int, kept: torch.Tensor | None = None) -> Callable[[], Any]:
        query = torch.randn(1, length, num_heads, dim, generator=generator).to(dtype).transpose(1, 2)
        keys, values = torch.randn(2, 1, columns, heads, dim, generator=generator).to(dtype).transpose(2, 3)
        return lambda: prompt_attention(query, keys, values, None, 0, dim**-0.5, kept)

    for length in WHOLE:
        if length <= most:
            yield f"{length} tokens", call(length, length)
    if CHUNK[1] <= most:
        yield f"{CHUNK[0]} of {CHUNK[1]}", call(*CHUNK)
    length, before = FOLLOW_UP
    kept = torch.rand(heads, before, generator=generator) < KEPT
    yield f"{length} after {before}/8", call(length, before + length, kept)


def forward_pass(args: argparse.Namespace) -> Callable[[], Any]:
    loaded = load(args.model, device="cpu")
    kv = attach(loaded.model, read(args.artifact))
    ids = torch.randint(3, 1000, (1, args.tokens), generator=torch.Generator().manual_seed(0))

    def call() -> None:
        with torch.inference_mode():
            loaded.model(ids, past_key_values=kv.new_cache(), logits_to_keep=1)

    return call


def report(name: str, call: Callable[[], Any], args: argparse.Namespace) -> None:
    clock, taken = time.process_time if args.processor else time.perf_counter, {"torch": [], "": []}
    for number in range(args.rounds + 1):
        for choice, found in taken.items():
            os.environ[CHOICE] = choice
            start, calls = clock(), 0
            while not calls or clock() - start < LEAST:
                call()
                calls += 1
            if number:
                found.append((clock() - start) / calls * 1e3)
    by_torch, by_c = map(statistics.median, taken.values())
    print(f"{name:<58} {by_torch:7.1f} {by_c:7.1f} {by_torch / by_c:11.2f}", flush=True)


if __name__ == "__main__":
    main()
