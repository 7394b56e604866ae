"""What the compiled scorer and the cut cost at prefill, as ratios in one run.

    python benchmarks/prefill.py ARTIFACT.kvb [--tokens 2048] [--rounds 9] [--model NAME]

Rounds alternate between a full cache, the artifact without its scorer (every token scores 0) and the artifact; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache

from kvcompile.artifacts import read
from kvcompile.models import load
from kvcompile.runtime import attach
from kvcompile.runtime.attach import LayerScorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model")
    args = parser.parse_args()
    plan = read(args.artifact)
    model = load(args.model or plan.model.name, dtype=getattr(torch, plan.model.dtype)).model
    ids = torch.randint(0, model.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    score = LayerScorer.__call__
    kv = attach(model, plan)

    @torch.inference_mode()
    def seconds(cache) -> float:
        start = time.perf_counter()
        model(ids, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"full cache": [], "without scorer": [], "artifact": []}
    for _ in range(args.rounds):
        times["full cache"].append(seconds(DynamicCache(config=model.config)))
        LayerScorer.__call__ = lambda self, hidden: torch.zeros(*hidden.shape[:2], len(self.bias))
        times["without scorer"].append(seconds(kv.new_cache()))
        LayerScorer.__call__ = score
        times["artifact"].append(seconds(kv.new_cache()))
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name, value in medians.items():
        print(f"{name:15} {value:.3f} s, {value / medians['full cache']:.3f} x full")
    print(f"scorer: {medians['artifact'] / medians['without scorer'] - 1:+.1%}")


if __name__ == "__main__":
    main()
