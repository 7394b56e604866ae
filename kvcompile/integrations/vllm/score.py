"""The compiled scorer as an operation that compiled and recorded graphs keep."""

from __future__ import annotations

import torch
from torch import nn
from vllm.utils.torch_utils import direct_register_custom_op


def _score(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the scores of tokens with the inputs `hidden` [T, d] of an attention block into the first rows of `out` f32
    [most tokens, H]; `weight` f32 [H, d], `bias` f32 [H]. In float32: in bfloat16, many tokens would score alike.

    The compiler is not told that `out` changes, as it would then be free to write a copy; what is returned, nothing,
    goes to the attention as an argument, so that it comes after. vLLM orders its own writes to caches in the same way.
    """
    torch.addmm(bias, hidden.float(), weight.mT, out=out[: len(hidden)])
    return out.new_empty(0)


def _fake(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.new_empty(0)


if not hasattr(torch.ops.vllm, "kvcompile_score"):
    direct_register_custom_op(op_name="kvcompile_score", op_func=_score, fake_impl=_fake)


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
        self._written: torch.Tensor | None = None

    def listen(self, projection: nn.Module) -> None:
        """Score whatever goes into this projection of queries, keys and values."""

        def hear(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._written = torch.ops.vllm.kvcompile_score(args[0], self.weight, self.bias, self.out)

        projection.register_forward_pre_hook(hear)

    def written(self) -> torch.Tensor | None:
        """What the scoring of this pass has returned, once."""
        found, self._written = self._written, None
        return found
