"""`append` of one layer, a token a sequence into a full store: the bytes are the scores, which are all read.

python benchmarks/append.py [--context 32768] [--batch 16]
"""

from __future__ import annotations

import torch
from layer import Layer, layer, options, report

from kvcompile.kernels import append


def main() -> None:
    args = options(__doc__).parse_args()
    subjects = {f"{widths} bits": layer(args, widths) for widths in ("16", "8", "4", "mixed")}
    scores = {name: torch.randn(one.batch, one.layout.scored_slots).half() for name, one in subjects.items()}

    def call(one: Layer, held: torch.Tensor):
        heads, dim = one.layout.num_kv_heads, one.keys.head_dim
        held, new = held.to(one.device), (one.random(one.batch, heads, dim), one.random(one.batch, heads, dim))
        score = one.random(one.batch, heads).float()
        return lambda: append(one.keys, one.values, held, one.layout, *new, score, one.seen)

    calls = {name: call(one, scores[name]) for name, one in subjects.items()}
    report("append", args, calls, {name: held.numel() * held.element_size() for name, held in scores.items()})


if __name__ == "__main__":
    main()
