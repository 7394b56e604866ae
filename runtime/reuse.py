"""What a layer leaves for later ones that attend to its keys and values, until the last of them has (Gemma-4 E2B and
E4B).

They see what the layer itself saw: all tokens of prompts, and of follow-ups the store as it was beside the new tokens.
So new tokens are only stored when all these layers are done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Again = Callable[[torch.Tensor, float], torch.Tensor]
"""Attention [B, num_heads, t, D] of the queries [B, num_heads, t, D] of the last t of the new tokens, with what
multiplies their logits."""


@dataclass(frozen=True)
class Reuse:
    """`again` for later layers (None: they are given all keys and values), and what is to be done after the last."""

    again: Again | None = None
    after: Callable[[], None] = lambda: None
