"""Continuation loss of several artifacts on one text, beside the full cache.

    python benchmarks/continuation.py TEXT ARTIFACT.kvb [ARTIFACT.kvb ...] [--windows 8] [--tokens 256]
        [--dtype float32] [--json FILE]

Windows of the artifacts' context are spread evenly over the text. Each is prefilled, cut to the budget, and the loss of
the next tokens is measured in steps of 32 tokens, so that eviction goes on as in decoding. The same tokens for all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from kvcompile.artifacts import Artifact, read
from kvcompile.models import load
from kvcompile.runtime import attach

STEP = 32


@torch.inference_mode()
def losses(model, cache, ids: torch.Tensor, context: int) -> torch.Tensor:
    """Negative log-likelihood of every token after the first `context` of `ids` [1, n]."""
    logits = [model(ids[:, :context], past_key_values=cache, logits_to_keep=1).logits]
    for start in range(context, ids.shape[1] - 1, STEP):
        logits.append(model(ids[:, start : min(start + STEP, ids.shape[1] - 1)], past_key_values=cache).logits)
    return cross_entropy(torch.cat(logits, 1)[0].float(), ids[0, context:], reduction="none")


def label(artifact: Artifact) -> str:
    solver = artifact.solver
    sink = "" if solver["policy"] != "recent" or solver["sink"] else " without sinks"
    return f"{solver['allocator']}, {solver['policy']}{sink}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", help="of the model's weights and arithmetic")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plans = [read(path) for path in args.artifacts]
    context = plans[0].target.context
    loaded = load(plans[0].model.name, dtype=getattr(torch, args.dtype))
    ids = torch.tensor(loaded.tokenizer(args.text.read_text(encoding="utf-8")).input_ids)
    length = context + args.tokens
    starts = torch.linspace(0, len(ids) - length, args.windows).long().tolist()
    windows = [ids[start : start + length][None] for start in starts]

    full = torch.stack([losses(loaded.model, DynamicCache(config=loaded.model.config), w, context) for w in windows])
    rows = [{"plan": "full cache", "loss": full.mean().item(), "increase": 0.0, "error": 0.0, "share": 1.0}]
    for plan in plans:
        with attach(loaded.model, plan) as kv:
            measured = torch.stack([losses(loaded.model, kv.new_cache(), w, context) for w in windows])
        increase = (measured - full).mean(1)
        rows.append(
            {
                "plan": label(plan),
                "loss": measured.mean().item(),
                "increase": increase.mean().item(),
                "error": increase.std().item() / len(windows) ** 0.5,
                "share": plan.bytes.resident / plan.bytes.full,
            }
        )
        Console(stderr=True).print(rows[-1])
    table = Table("plan", "bytes", "loss", "over full", "standard error")
    for row in sorted(rows, key=lambda row: row["loss"]):
        numbers = (f"{row['share']:.2%}", *(f"{row[key]:.4f}" for key in ("loss", "increase", "error")))
        table.add_row(row["plan"], *numbers)
    Console(width=100).print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
