"""What it costs to cut a prompt to the budget on the way (`prefill_cut_every`).

    python benchmarks/cut_every.py --model NAME --context 3500 --every 0,1024,512 ARTIFACT.kvb TEXT [TEXT ...]

From two places of every text, a context is read with the full cache and inside the budget, cut after its last token
(0) or every so many. Then come, each after the context alone, how the text goes on (200 tokens) and four quotes of the
context (64 tokens each, of which the last 48 count, in different eighths of it): loss and KL to the full cache, in nats
a token, the median seconds that reading took, and `prefill_bytes` at the model's dtype.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy, kl_div
from transformers import DynamicCache

from kvcompile.artifacts import feed_forward_elements, prefill_bytes, read
from kvcompile.models import load
from kvcompile.runtime import Decoder, attach

PLACES = (0.1, 0.6)
"""Where contexts begin, as shares of a text."""
GOES_ON, QUOTE, SKIPPED = 200, 64, 16
"""Tokens; of a quote the first ones only say which passage it is."""
EIGHTHS = (0, 2, 4, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--context", type=int, default=3500)
    parser.add_argument("--every", default="0,1024,512")
    args = parser.parse_args()
    loaded, plan = load(args.model, dtype=torch.float32), read(args.artifact)
    contexts = [ids for path in args.texts for ids in parts(loaded.tokenizer, path, args.context)]
    ways = [int(every) for every in args.every.split(",")]
    found: dict[int | None, list[list[float]]] = {every: [] for every in (None, *ways)}
    for ids in contexts:
        known = full(loaded.model, ids, args.context)
        found[None].append([0.0, *measured(known, known)])
        with attach(loaded.model, plan) as kv:
            for every in ways:
                found[every].append(budget(loaded.model, kv.new_cache(), ids, args.context, every or None, known))
    shown = Table("cut every", "goes on, loss", "KL", "quotes, loss", "KL", "seconds", "prefill MB")
    for way, rows in found.items():
        seconds, *columns = zip(*rows, strict=True)
        cells = [f"{statistics.mean(column):.4f}" for column in columns]
        if way is None:
            shown.add_row("full cache", *cells)
            continue
        inner = feed_forward_elements(loaded.model.config)
        taken = prefill_bytes(plan, 1, args.context, cut_every=way or None, inner=inner)
        shown.add_row(str(way or "-"), *cells, f"{statistics.median(seconds):.1f}", f"{taken / 1e6:.1f}")
    Console(width=120).print(shown)


def parts(tokenizer: Any, path: Path, context: int) -> list[torch.Tensor]:
    """Contexts with what goes on after them, int64 [1, context + GOES_ON]."""
    text = path.read_text(errors="replace")
    starts = [text[int(share * len(text)) :][: 8 * (context + GOES_ON)] for share in PLACES]
    return [tokenizer(start, return_tensors="pt").input_ids[:, : context + GOES_ON] for start in starts]


def follow_ups(ids: torch.Tensor, context: int) -> list[torch.Tensor]:
    """What is asked for after a context: how it goes on, then quotes of it."""
    starts = [eighth * context // 8 + 100 for eighth in EIGHTHS]
    return [ids[:, context:], *(ids[:, start : start + QUOTE] for start in starts)]


@torch.inference_mode()
def full(model: Any, ids: torch.Tensor, context: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Log-probabilities [n, vocab] with the full cache, and the tokens, of every follow-up."""
    cache = DynamicCache(config=model.config)
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    return [answered(model, copy.deepcopy(cache), follow) for follow in follow_ups(ids, context)]


def answered(model: Any, cache: Any, follow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model(follow, past_key_values=cache).logits[0, :-1].log_softmax(-1), follow[0, 1:]


@torch.inference_mode()
def budget(model: Any, cache: Any, ids: torch.Tensor, context: int, every: int | None, known: Any) -> list[float]:
    start = time.perf_counter()
    Decoder(model, cache, prefill_cut_every=every).prefill(ids[:, :context])
    seconds = time.perf_counter() - start
    own = [answered(model, copy.deepcopy(cache), follow) for follow in follow_ups(ids, context)]
    return [seconds, *measured(own, known)]


def measured(own: Any, known: Any) -> list[float]:
    """Loss and KL of what goes on, and of quotes."""
    rows = []
    for i, ((one, tokens), (other, _)) in enumerate(zip(own, known, strict=True)):
        counted = slice(0 if not i else SKIPPED, None)
        loss = cross_entropy(one[counted], tokens[counted])
        kl = kl_div(one[counted], other[counted], log_target=True, reduction="batchmean")
        rows.append((float(loss), float(kl)))
    goes_on, *quotes = rows
    return [*goes_on, *(statistics.mean(values) for values in zip(*quotes, strict=True))]


if __name__ == "__main__":
    main()
