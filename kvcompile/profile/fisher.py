"""The gradient pass: the gradient at every head's attention output, for labels that the model itself draws.

With y ~ p(. | context) and g the gradient of log p(y), the Fisher matrix E[g g'] is the Hessian of the KL divergence
from the model's own distribution. A change d of an output then costs KL of about 1/2 d' E[g g'] d = 1/2 E[(g . d)^2]: a
mean of squares over rows, each with one label drawn, estimates it without ever forming the matrix.

Layers are gone through one by one, last to first, each recomputed from its input: there is never more than one layer's
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvcompile.profile.attention import Attention, Handler, causal
from kvcompile.profile.layerwise import through
from kvcompile.profile.structure import head_blocks, logits

BACKWARD_TICKS = 3
"""Work of the backward pass through a layer, recomputation and curves included, in forward passes."""

Visit = Callable[[Attention, Tensor], None]
"""Is given a layer's attention and the gradient [Hq, n, D] of the log-likelihood with respect to its output."""


def head_gradient(model: Any, final: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Gradient [n, d] at the last layer's output of the summed log-likelihood of one sampled label a position.

    The labels follow the model's own distribution (true Fisher, not empirical). They are drawn by inverting its
    cumulative distribution at one uniform number a position, so they depend neither on blocks nor on the device's
    random numbers.
    """
    uniform = torch.from_numpy(np.random.default_rng(seed).random(len(final), dtype=np.float32)).to(final.device)
    gradient = torch.empty_like(final)
    for block in head_blocks(model, len(final)):
        hidden = final[block].detach().requires_grad_()
        with torch.enable_grad():
            scores = logits(model, hidden)
        probability = scores.detach().float().softmax(-1)
        labels = draw(probability, uniform[block])
        # d log softmax(z)[y] / dz = onehot(y) - softmax(z)
        slope = probability.neg_().scatter_add_(-1, labels, torch.ones_like(labels, dtype=torch.float32))
        (gradient[block],) = torch.autograd.grad(scores, hidden, slope.to(scores.dtype))
    return gradient


def draw(probability: Tensor, uniform: Tensor) -> Tensor:
    """Labels i64 [m, 1] from distributions [m, vocab]: the first whose cumulative probability exceeds `uniform` [m]."""
    cumulative = probability.cumsum(-1)
    # In float32 it does not end at 1, so the uniform number is scaled to where it ends.
    labels = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return labels.clamp_(max=probability.shape[-1] - 1)


def backward(
    layer: nn.Module,
    below: Tensor,
    arguments: dict[str, Any],
    upstream: Tensor,
    visit: Visit,
    attend: Handler = causal,
) -> Tensor:
    """Carry the gradient `upstream` [1, n, d] at a layer's output back to its input `below` [1, n, d], and let `visit`
    see the attention in between. `attend` is the attention of the forward pass."""

    def watched(call: Attention) -> Tensor:
        output = attend(call)
        detached = replace(call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach())
        # Autograd carries the gradient through W_O to the heads' outputs: `upstream` is u of `losses`, [Hq, n, D].
        output.register_hook(lambda upstream: visit(detached, upstream))  # type: ignore[no-untyped-call]
        return output

    # The forward pass kept no graph: this layer's is made anew from its input, and freed after use.
    inputs = below.detach().requires_grad_()
    with torch.enable_grad():
        output = through(layer, inputs, arguments, watched)
    (gradient,) = torch.autograd.grad(output, inputs, upstream)
    return gradient
