"""A decode step's attention on a CPU by the codecs of keys and values: nanoseconds of processor time a stored slot.

    OMP_NUM_THREADS=1 python benchmarks/codec_pairs.py [--head-dim 64] [--group 3]

Four sequences, three KV heads of 2,048 slots in bfloat16, all full; the best of 30 calls.
"""

from __future__ import annotations

import argparse
import time

import torch

from kvcompile.kernels import Buffers, HeadSpec, LayerLayout, ragged_decode
from kvcompile.kernels.codecs import names

PAIRS = ("int8/int8", "int4/int4", "mix3/int4", "mix3/int3", "int3/int3", "int2/int2", "mix2/int2")
BATCH, HEADS, SLOTS, ROUNDS = 4, 3, 2048, 30


def measured(pair: str, head_dim: int, group: int) -> tuple[float, float]:
    """Nanoseconds and bytes a slot."""
    k_bits, v_bits = (names()[name] for name in pair.split("/"))
    layout = LayerLayout.from_heads([HeadSpec("full", SLOTS, 4, SLOTS - 4, k_bits, v_bits)] * HEADS)
    sides = [
        Buffers(layout, [bits] * len(layout.classes), head_dim, torch.bfloat16, torch.device("cpu"), BATCH)
        for bits in (k_bits, v_bits)
    ]
    stored = [tensor for side in sides for tensor in side.tensors()]
    for tensor in stored:
        tensor.fill_(0.01) if tensor.is_floating_point() else tensor.random_(0, 256)
    query = torch.randn(BATCH, HEADS * group, 1, head_dim).bfloat16()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        ragged_decode(query, *sides, layout, [SLOTS] * BATCH, scaling=head_dim**-0.5)
        best = min(best, time.process_time() - start)
    slots = BATCH * HEADS * SLOTS
    return best / slots * 1e9, sum(t.numel() * t.element_size() for t in stored) / slots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--group", type=int, default=3)
    options = parser.parse_args()
    for pair in PAIRS:
        nanoseconds, size = measured(pair, options.head_dim, options.group)
        print(f"{pair}: {nanoseconds:.1f} ns and {size:.0f} bytes a slot, {nanoseconds / size:.3f} ns a byte")


if __name__ == "__main__":
    main()
