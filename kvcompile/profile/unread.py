"""A product of a layer that is computed anew for its gradient alone: what comes out of it is never looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@contextmanager
def unread_output(layer: nn.Module) -> Iterator[None]:
    """Within, the last product of a decoder layer's MLP is left out, where nothing but the residual stream comes after
    it: the layer's output is not what it was, its gradient is, bit for bit. That is a seventh of a layer's products."""
    product = _last_product(layer)
    if product is None:
        yield
        return
    apply: Any = _Unread.apply
    try:
        product.forward = lambda x: apply(x, product.weight)
        yield
    finally:
        del product.forward


def _last_product(layer: nn.Module) -> Any:
    product: Any = getattr(getattr(layer, "mlp", None), "down_proj", None)
    plain = type(product) is nn.Linear and product.bias is None
    own = plain and "forward" not in vars(product)  # not as accelerate has it, which brings weights along
    # What a norm makes of it depends on it, so the norm's gradient does too.
    return product if own and not hasattr(layer, "post_feedforward_layernorm") else None


class _Unread(torch.autograd.Function):
    """x W' for `x` [..., n] and `weight` W [m, n], as far as its gradient is concerned; it reads as zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.new_zeros(1).expand(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return upstream @ weight, None
