"""The compiled scorer as one layer of an attached model uses it."""

from __future__ import annotations

import torch

from kvcompile.artifacts import Scorer
from kvcompile.kernels.dispatch import without_autocast


class LayerScorer:
    """The compiled scorer of one layer: `weight` f32 [H, d] and `bias` f32 [H], in storage order. All in float32:
    in bfloat16, many tokens would score alike. They are no buffers of the model, whose dtype and state dict are
    not theirs, but follow it to another device when it is next called."""

    def __init__(self, scorer: Scorer, layer: int, order: list[int], like: torch.Tensor) -> None:
        self.weight = torch.tensor(scorer.weight[layer][order], dtype=torch.float32, device=like.device)
        self.bias = torch.tensor(scorer.bias[layer][order], device=like.device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores f32 [B, T, H] of tokens by the input [B, T, d] of the attention block."""
        if self.weight.device != hidden.device:
            with torch.inference_mode(False):  # autograd refuses tensors made in inference mode ever after
                self.weight, self.bias = self.weight.to(hidden.device), self.bias.to(hidden.device)
        with without_autocast(hidden.device):
            return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)
