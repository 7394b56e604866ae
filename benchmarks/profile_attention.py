"""What a profile measures of a layer's attention, in C beside torch, on a CPU.

    python benchmarks/profile_attention.py [--rounds 5] [--dtype bfloat16]

Follow-ups like those of an episode come after a context of 2,048 tokens. The two take turns; milliseconds of the
processor's time of one thread, the best of all rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels import Asked, Changes, Rows, attention_effects, attention_peaks, error_weights, followed
from kvcompile.kernels.dispatch import CHOICE
from kvcompile.profile.attention import Attention, masked, visible

SHAPES = {"9/3 x 64": (9, 3, 64), "14/2 x 64": (14, 2, 64), "12/2 x 128": (12, 2, 128)}
CONTEXT, FOLLOW_UPS, REPLAY = 2048, (256, 80, 80, 80, 80, 20, 20, 20), 1044
BUDGETS, WAYS, KEY_CODECS, VALUE_CODECS = 28, 4, 5, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        for what, by_way in operations(*shape, getattr(torch, args.dtype)):
            best = dict.fromkeys(by_way, float("inf"))
            for _ in range(args.rounds):
                for way, call in by_way.items():
                    start = time.process_time()
                    call()
                    best[way] = min(best[way], 1000 * (time.process_time() - start))
            print(f"{name:<12} {what:<24} torch {best['torch']:7.1f}   C {best['C']:7.1f}", flush=True)


def operations(
    num_heads: int, heads: int, dim: int, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    generator, scaling = torch.Generator().manual_seed(0), dim**-0.5

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    keys, values = draw(2, heads, CONTEXT, dim)
    entry = torch.randint(0, BUDGETS, (heads, CONTEXT, WAYS), generator=generator, dtype=torch.int32)
    others = [tuple(draw(n, heads, CONTEXT, dim).float() / 10) for n in (KEY_CODECS, VALUE_CODECS)]
    changes = Changes(entry, BUDGETS, *others)
    asked = []
    for own in FOLLOW_UPS:
        places = torch.linspace(own / 5, own - 1, min(own * 4 // 5, 128)).round().long()
        rows = draw(2, num_heads, len(places), dim)
        asked.append(Asked(rows[0], rows[1], *draw(2, heads, own, dim), places, 2 if len(places) >= 64 else 1))
    yield "attention_effects", both(lambda: attention_effects(asked, keys, values, changes, scaling))

    query, own_keys = draw(num_heads, REPLAY, dim), draw(heads, REPLAY, dim)
    yield "attention_peaks", both(lambda: attention_peaks(query, keys, own_keys, torch.arange(REPLAY), scaling))

    outward = draw(num_heads, num_heads * dim, dim).float()
    rows = [Rows(one.query, one.own_keys, one.places) for one in asked]
    yield "error_weights", both(lambda: error_weights(rows, keys, values, outward.mT @ outward, scaling))

    upstream = [draw(num_heads, own, dim) for own in FOLLOW_UPS]
    given = [[draw(n, own, dim).requires_grad_() for n in (num_heads, heads, heads)] for own in FOLLOW_UPS]

    def by_torch(query: Tensor, own_keys: Tensor, own_values: Tensor) -> Tensor:
        k, v = torch.cat([keys, own_keys], 1), torch.cat([values, own_values], 1)
        seen = visible(torch.arange(CONTEXT, k.shape[1]), torch.arange(k.shape[1]), None)
        return masked(Attention(0, query, k, v, scaling, None), query, k, v, seen)

    def differentiated(call: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: [torch.autograd.grad(call(*g), g, u) for g, u in zip(given, upstream, strict=True)]

    yield (
        "followed, gradient",
        {
            "torch": differentiated(by_torch),
            "C": differentiated(lambda q, k, v: followed(q, keys, values, k, v, scaling)),
        },
    )


def both(call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    def by_torch() -> None:
        os.environ[CHOICE] = "torch"
        try:
            call()
        finally:
            del os.environ[CHOICE]

    return {"torch": by_torch, "C": call}


if __name__ == "__main__":
    main()
