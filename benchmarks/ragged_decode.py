"""`ragged_decode` of one layer, a token a sequence over a full store: keys, values and scales are read once.

python benchmarks/ragged_decode.py [--context 32768] [--batch 16] [--group 7]

Beside attention over the full cache (torch SDPA, flex attention, FlashInfer) it is measured by `kvcompile bench`.
"""

from __future__ import annotations

from layer import Layer, layer, options, report

from kvcompile.kernels import ragged_decode


def main() -> None:
    args = options(__doc__).parse_args()
    subjects = {f"{widths} bits": layer(args, widths) for widths in ("16", "8", "4", "mixed")}

    def call(one: Layer):
        for stored in (one.keys, one.values):
            for tensor in stored.tensors():
                tensor.fill_(1) if tensor.is_floating_point() else tensor.random_(0, 256)
        dim = one.keys.head_dim
        query = one.random(one.batch, one.model.num_attention_heads, 1, dim)
        return lambda: ragged_decode(query, one.keys, one.values, one.layout, one.seen, scaling=dim**-0.5)

    calls = {name: call(one) for name, one in subjects.items()}
    report("ragged_decode", args, calls, {name: one.stored_bytes for name, one in subjects.items()})


if __name__ == "__main__":
    main()
