"""The compiled scorer as an operation that compiled graphs keep."""

from __future__ import annotations

import torch
from torch import nn


@torch.library.custom_op("kvcompile::score", mutates_args={"out"})
def score(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    """Write the scores of tokens with the inputs `hidden` [T, d] of an attention block into the first rows of `out` f32
    [most tokens, H]; `weight` f32 [H, d], `bias` f32 [H]. In float32: in bfloat16, many tokens would score alike."""
    torch.addmm(bias, hidden.float(), weight.mT, out=out[: len(hidden)])


@score.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    return None


class Scores(nn.Module):
    """One layer's scorer, and its word on the tokens of the forward pass under way: `out` f32 [most tokens, H], which
    stays where it is, as recorded graphs write and read it. Heads in the rank's own order."""

    weight: torch.Tensor
    bias: torch.Tensor
    out: torch.Tensor

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, most_tokens: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        out = torch.zeros(most_tokens, len(bias), dtype=torch.float32, device=bias.device)
        self.register_buffer("out", out, persistent=False)

    def listen(self, projection: nn.Module) -> None:
        """Score whatever goes into this projection of queries, keys and values."""

        def hear(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            torch.ops.kvcompile.score(args[0], self.weight, self.bias, self.out)

        projection.register_forward_pre_hook(hear)
