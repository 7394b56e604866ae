"""Importance of heads and layers from cosines in one forward pass: BaKlaVa's and SqueezeAttention's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kvcompile.profile.attention import Attention, Handler


@dataclass
class Cosines:
    """Means over one window's tokens in one layer. `value` float64 [Hq]: cos(a head's value row, its attention output).
    `residual`: cos(residual stream before the attention block, and after it, before the MLP)."""

    value: NDArray[np.float64]
    residual: float = float("nan")

    def attending(self, handler: Handler) -> Handler:
        """The handler, watched: it fills `value` in."""

        def attend(call: Attention) -> Tensor:
            output = handler(call)
            values = call.value.repeat_interleave(len(output) // len(call.value), dim=0)
            self.value[:] = _mean_cosine(values, output).cpu().numpy()
            return output

        return attend


@contextmanager
def watching(layer: nn.Module, num_heads: int) -> Iterator[Cosines]:
    """Fill `residual` in from whatever forward pass goes through `layer` inside the block."""
    seen = Cosines(np.zeros(num_heads))
    before: Tensor | None = None

    def enter(_: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal before
        before = args[0]

    def leave(_: nn.Module, args: tuple[Tensor]) -> None:
        assert before is not None
        seen.residual = _mean_cosine(before, args[0]).item()

    hooks = [
        layer.register_forward_pre_hook(enter),
        _after_attention(layer).register_forward_pre_hook(leave),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _after_attention(layer: nn.Module) -> nn.Module:
    """The module that is given the residual stream as it is after attention: usually the norm before the MLP."""
    # Gemma-3 has norms on both sides of its blocks; there `post_attention_layernorm` is inside the residual.
    if hasattr(layer, "pre_feedforward_layernorm"):
        return layer.get_submodule("pre_feedforward_layernorm")
    # OLMo-2 has them behind its blocks alone, so that the MLP reads the stream itself.
    return layer.get_submodule("post_attention_layernorm" if hasattr(layer, "input_layernorm") else "mlp")


def baklava(value: NDArray[np.float64], residual: NDArray[np.float64], num_kv_heads: int) -> NDArray[np.float64]:
    """BaKlaVa's importance (arXiv 2502.13176), float64 [L, H], from the cosines `value` [L, Hq] and `residual` [L].

    Stated: a head's importance is 1 - cosine(its input, its output), combined with a proxy for its layer. Our reading:
    the input is the head's value row, a KV head takes the mean over its query heads, the proxy is one minus
    SqueezeAttention's cosine of the layer, and the two are multiplied.
    """
    head = (1 - value).reshape(len(value), num_kv_heads, -1).mean(-1)
    importance: NDArray[np.float64] = head * (1 - residual)[:, None]
    return importance


def _mean_cosine(left: Tensor, right: Tensor) -> Tensor:
    """Cosine over the last axis, averaged over the one before it."""
    return F.cosine_similarity(left.float(), right.float(), dim=-1).mean(-1, dtype=torch.float64)
