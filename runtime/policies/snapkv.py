"""SnapKV (arXiv 2404.14469): what the prompt's last queries attend to is kept."""

from __future__ import annotations

import torch
from torch.nn.functional import max_pool1d

from kvcompile.runtime.drawn import attention_drawn
from kvcompile.runtime.policies.base import Policy, Prompt

WINDOW = 32
"""Queries at the end of the prompt whose attention is observed."""
KERNEL = 7
"""Width of the max-pooling over tokens, so that neighbours of a hit stay with it."""


class SnapKV(Policy):
    """The chosen prompt tokens are fixed after prefill; generated tokens live in the ring."""

    queries = WINDOW

    def score(self, prompt: Prompt) -> torch.Tensor:
        drawn = attention_drawn(prompt.query, prompt.keys, prompt.pad, prompt.scaling, prompt.softmax)
        # Padding draws nothing, so it raises no neighbour.
        return max_pool1d(drawn / prompt.query.shape[2], KERNEL, stride=1, padding=KERNEL // 2)
