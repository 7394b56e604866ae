"""`append` and `compact` of one layer: seconds and the bytes they touch.

    python benchmarks/append.py [--context 32768] [--batch 16] [--widths 16]

A step's write into a full store of Qwen2.5-7B's shape, and cutting one sequence's prompt to a quarter of the bytes.
"""

from __future__ import annotations

import argparse

import torch

from kvcompile.artifacts import identify
from kvcompile.bench.subjects import CONFIGS, ragged_plan
from kvcompile.bench.timing import copy_bandwidth, medians
from kvcompile.kernels import Stored, append, compact
from kvcompile.runtime.attach import layer_layouts
from kvcompile.runtime.store import kept_tokens
from kvcompile.runtime.turn import layer_turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--widths", choices=["16", "8", "4", "mixed"], default="16")
    args = parser.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.for_model(**{**CONFIGS["qwen2.5-7b"], "num_hidden_layers": 1, "vocab_size": 97})
    model = identify(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), "one layer")
    plan = ragged_plan(model, args.context, args.batch, 0.25, "bfloat16", args.widths)
    layout = layer_layouts(plan)[0]
    turn = layer_turn(plan.quantiser, 0, plan.budgets.head_order[0].tolist(), layout, device)
    sides = [
        Stored(layout, [getattr(c, name) for c in layout.classes], 128, torch.bfloat16, device, args.batch)
        for name in ("k_bits", "v_bits")
    ]
    scores = torch.randn(args.batch, layout.scored_slots, device=device).half()
    new = [torch.randn(args.batch, 4, 128, dtype=torch.bfloat16, device=device) for _ in range(2)]
    score = torch.randn(args.batch, 4, device=device)
    seen = torch.full((args.batch,), args.context, dtype=torch.int32, device=device)
    prompt = [torch.randn(4, args.context, 128, dtype=torch.bfloat16, device=device) for _ in range(2)]
    worth = torch.randn(4, args.context, device=device)
    tokens = [kept_tokens(c, args.context, worth[c.heads], device) for c in layout.classes]
    taken = medians(
        {
            "append": lambda: append(*sides, scores, layout, *new, score, seen),
            "compact": lambda: compact(*sides, layout, 0, *prompt, tokens, turn),
        },
        device,
        21,
    )
    bandwidth = copy_bandwidth(device)
    stored = sum(t.numel() * t.element_size() for side in sides for t in side.tensors()) / args.batch
    read = sum(int(t.numel()) for t in tokens) * 2 * 128 * 2
    moved = {"append": scores.numel() * 2, "compact": stored + read}
    for name, seconds in taken.items():
        share = moved[name] / seconds / bandwidth
        print(f"{name:8} {seconds * 1e6:9.1f} us, {moved[name] / 1e6:8.2f} MB, {share:.1%} of the copy bandwidth")


if __name__ == "__main__":
    main()
