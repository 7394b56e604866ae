"""The launch table of `ragged_decode` (`kernels/ragged_decode/tuning.py`), measured on a GPU.

    python benchmarks/tuning.py [--widths 16,8,4,mixed,mix3,mix2] [--share 0.25] [--rounds 9]
    python benchmarks/tuning.py --widths 4 --vary early=0 --vary registers=168,together=3 --vary block=64,halves=2

A line a variant: microseconds of a layer of Qwen2.5-7B's shape, 16 sequences of 32,768 tokens at 25 % of the bytes.
With `--vary` the table's own line is varied in that alone.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import replace

import torch

from kvcompile.bench.layers import ragged_layers
from kvcompile.bench.subjects import ragged_plan, shape_of
from kvcompile.bench.timing import medians
from kvcompile.kernels.ragged_decode.pairs import pairs_of
from kvcompile.kernels.ragged_decode.tuning import Tuning, entry

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
    parser.add_argument("--share", type=float, default=0.25, help="of the full cache's bytes")
    parser.add_argument("--vary", type=_fields, action="append", help="fields of a Tuning, parted by commas")
    parser.add_argument("--rounds", type=int, default=9, help="0: compile, and measure nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU")
    for widths in args.widths.split(","):
        measure(widths, args.share, args.vary, args.rounds)


def _fields(text: str) -> dict[str, int]:
    pairs = (field.split("=") for field in text.split(","))
    return {name: int(value) for name, value in pairs}


@torch.inference_mode()
def measure(widths: str, share: float, varied: list[dict[str, int]] | None, rounds: int) -> None:
    """All variants on the same stores, and whether all find the same."""
    device = torch.device("cuda")
    plan = ragged_plan(shape_of("qwen2.5-7b"), 32768, 16, share, "bfloat16", widths)
    layers = ragged_layers(plan, device)
    stores = list(zip(layers.keys, layers.values, layers.layouts, strict=True))
    query = torch.randn(16, 28, 1, 128, dtype=torch.bfloat16, device=device)
    layout = layers.layouts[0]
    own = entry(128, torch.bfloat16, pairs_of((row.k_codec, row.v_codec) for row in layout.rows))
    found: dict[tuple[int, ...], torch.Tensor] = {}
    for chosen in VARIANTS if varied is None else [replace(own, **one) for one in varied]:
        calls = [
            lambda one=one, chosen=chosen: kernel.ragged_decode(
                query, *one, layers.seen, layers.scaling, None, None, None, chosen=chosen
            )
            for one in stores
        ]
        out = calls[0]()
        differs = (out - found.setdefault((chosen.block, chosen.halves, chosen.waves), out)).abs().max().item()
        if rounds:
            seconds = medians({"": calls}, device, rounds)[""]
            print(f"{widths}, {share:.4f}: {chosen}: {seconds * 1e6:.1f} us, {layers.bytes / seconds / 1e12:.2f} TB/s, "
                  f"differs by {differs}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
