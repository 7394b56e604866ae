"""SnapKV (arXiv 2404.14469): what the prompt's last queries attend to is kept."""

from __future__ import annotations

import torch
from torch.nn.functional import max_pool1d

from kvcompile.runtime.policies.base import Policy

WINDOW = 32
"""Queries at the end of the prompt whose attention is observed."""
KERNEL = 7
"""Width of the max-pooling over tokens, so that neighbours of a hit stay with it."""


class SnapKV(Policy):
    """The chosen prompt tokens are fixed after prefill; generated tokens live in the ring."""

    def score(
        self, query: torch.Tensor, keys: torch.Tensor, scaling: float, by_scorer: torch.Tensor | None
    ) -> torch.Tensor:
        n = keys.shape[1]
        window = min(WINDOW, n)
        logits = query[:, :, -window:].float() @ keys.unsqueeze(1).float().mT * scaling
        ahead = torch.ones(window, n, dtype=torch.bool, device=keys.device).triu(n - window + 1)
        attention = logits.masked_fill(ahead, float("-inf")).softmax(-1).sum(2).mean(1)
        return max_pool1d(attention, KERNEL, stride=1, padding=KERNEL // 2)
