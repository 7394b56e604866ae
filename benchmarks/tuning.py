"""The launch table of `ragged_decode` (`kernels/ragged_decode/tuning.py`), measured on a GPU.

    python benchmarks/tuning.py [--widths 16,8,4,mixed,mix3,mix2] [--rounds 9]

A line a variant: microseconds of a layer of Qwen2.5-7B's shape, 16 sequences of 32,768 tokens at 25 % of the bytes.
"""

from __future__ import annotations

import argparse
import importlib
import sys

import torch

from kvcompile.bench.layers import ragged_layers
from kvcompile.bench.subjects import ragged_plan, shape_of
from kvcompile.bench.timing import medians
from kvcompile.kernels.ragged_decode.tuning import Tuning

# `kvcompile.kernels.ragged_decode` is the function too.
kernel = importlib.import_module("kvcompile.kernels.ragged_decode.triton")
VARIANTS = [
    Tuning(block, halves, num_stages=stages, waves=waves)
    for block, halves, stages in [(64, 2, 2), (64, 2, 3), (32, 1, 3)]
    for waves in (1, 2, 3)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="16,8,4,mixed,mix3,mix2", help="parted by commas")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU")
    for widths in args.widths.split(","):
        measure(widths, args.rounds)


@torch.inference_mode()
def measure(widths: str, rounds: int) -> None:
    """All variants on the same stores."""
    device = torch.device("cuda")
    plan = ragged_plan(shape_of("qwen2.5-7b"), 32768, 16, 0.25, "bfloat16", widths)
    layers = ragged_layers(plan, device)
    stores = list(zip(layers.keys, layers.values, layers.layouts, strict=True))
    query = torch.randn(16, 28, 1, 128, dtype=torch.bfloat16, device=device)
    for chosen in VARIANTS:
        calls = [
            lambda one=one, chosen=chosen: kernel.ragged_decode(
                query, *one, layers.seen, layers.scaling, None, None, None, chosen=chosen
            )
            for one in stores
        ]
        seconds = medians({"": calls}, device, rounds)[""]
        print(f"{widths}: {chosen}: {seconds * 1e6:.1f} us, {layers.bytes / seconds / 1e12:.2f} TB/s", flush=True)


if __name__ == "__main__":
    main()
