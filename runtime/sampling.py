"""Choosing the next token, on the device and with fixed shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvcompile.artifacts import CacheError


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `top_p` keeps the likeliest tokens that together have this share, `top_k` so many of
    them (0: all). The meaning and the order of the filters are those of transformers: temperature, top k, top p."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise CacheError(
                f"sampling with temperature {self.temperature}, top_p {self.top_p} and top_k {self.top_k}: expected a "
                "finite temperature of at least 0, a top_p above 0 and at most 1, and a top_k of at least 0"
            )

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [B] by `logits` [B, vocab]; nothing waits for the host."""
        if self.temperature == 0:
            return logits.argmax(-1)
        weights = self.filtered(logits).softmax(-1)
        # The largest of p / e with exponential e is a draw by p; `multinomial` would ask the host.
        return (weights / torch.empty_like(weights).exponential_()).argmax(-1)

    def filtered(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits f32 [B, vocab] after temperature and filters, -inf for what is out."""
        logits = logits.float() / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1:
            ordered, place = logits.sort(dim=-1)
            out = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            out[:, -1] = False  # the likeliest one always stays
            logits = logits.masked_fill(out.scatter(-1, place, out), float("-inf"))
        return logits
