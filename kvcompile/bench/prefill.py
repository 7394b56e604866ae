"""What the cut and the compiled scorer cost at prefill, as ratios in one run."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from kvcompile.artifacts import Artifact
from kvcompile.bench.timing import medians


def measure_prefill(model: Any, plan: Artifact, batch: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds to read `tokens` tokens with a full cache, with the artifact, and with the artifact but every
    token scoring 0; the three take turns."""
    from transformers import DynamicCache

    from kvcompile.runtime import attach
    from kvcompile.runtime.attach import LayerScorer

    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)

    def read(cache: Any) -> None:
        model(ids, past_key_values=cache, logits_to_keep=1)

    def unscored() -> None:
        with patch.object(LayerScorer, "__call__", _nothing):
            read(kv.new_cache(batch))

    with attach(model, plan) as kv, torch.inference_mode():
        calls = {
            "full cache": lambda: read(DynamicCache(config=model.config)),
            "artifact without its scorer": unscored,
            "artifact": lambda: read(kv.new_cache(batch)),
        }
        return medians(calls, model.device, rounds)


def _nothing(scorer: Any, hidden: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*hidden.shape[:2], len(scorer.bias), device=hidden.device)
