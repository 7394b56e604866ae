"""`compact` of one layer: prompts are cut to a quarter of its bytes; rows that are kept are read and written once.

python benchmarks/compact.py [--context 32768]
"""

from __future__ import annotations

import torch
from layer import Layer, layer, options, report

from kvcompile.kernels import compact
from kvcompile.runtime.cut import kept_columns
from kvcompile.runtime.transforms import layer_transform


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(batch=1)
    args = parser.parse_args()
    subjects = {f"{widths} bits": layer(args, widths) for widths in ("16", "8", "4", "mixed")}

    def call(one: Layer):
        heads, dim = one.layout.num_kv_heads, one.keys.head_dim
        prompt = [one.random(one.batch, heads, one.context, dim) for _ in range(2)]
        scores, pad = one.random(one.batch, heads, one.context).float(), torch.zeros_like(one.seen, dtype=torch.int64)
        tokens = [kept_columns(c, one.context, pad, scores[:, c.heads]) for c in one.layout.classes]
        order = one.plan.budgets.head_order[0].tolist()
        transform = layer_transform(one.plan.quantiser, 0, order, one.layout, one.device)
        read = sum(t.numel() for t in tokens) * 2 * dim * prompt[0].element_size()
        moved = read + one.stored_bytes
        return lambda: compact(one.keys, one.values, one.layout, *prompt, tokens, one.seen, transform), moved

    made = {name: call(one) for name, one in subjects.items()}
    report("compact", args, {n: c for n, (c, _) in made.items()}, {n: moved for n, (_, moved) in made.items()},
           recorded=False)  # fmt: skip


if __name__ == "__main__":
    main()
