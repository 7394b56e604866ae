"""The gradient pass: the gradient at every head's attention output, for labels that the model itself draws.

With y ~ p(. | context) and g the gradient of log p(y), the Fisher matrix E[g g'] is the Hessian of the KL divergence
from the model's own distribution. A change d of an output then costs KL of about 1/2 d' E[g g'] d = 1/2 E[(g . d)^2]: a
mean of squares over rows estimates it without ever forming the matrix.

g is the gradient of the label's logit less that of all logits' mean under p. With two labels y and y', drawn apart,
the gradient of (z_y - z_y') / sqrt(2) has the same second moments, E[g g'], as the mean drops out of the difference.
It takes two rows of the head's weights, where the mean takes all of them once more.

Layers are gone through one by one, last to first, each recomputed from its input: there is never more than one layer's
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvcompile.profile.attention import Attention, Handler, causal
from kvcompile.profile.calls import SHARED
from kvcompile.profile.layerwise import through
from kvcompile.profile.structure import chosen_logits, head_blocks, logits
from kvcompile.profile.unread import unread_output

BACKWARD_TICKS = 3
"""Work of the backward pass through a layer, recomputation and curves included, in forward passes."""

Visit = Callable[[Attention, Tensor], None]
"""Is given a layer's attention and the gradient [Hq, n, D] with respect to its output."""


def head_gradient(model: Any, final: Tensor, seed: tuple[int, ...]) -> Tensor:
    """Gradient [n, d] at the last layer's output of the difference of two sampled labels' logits a position, over the
    root of 2, summed.

    The labels follow the model's own distribution (true Fisher, not empirical). They are drawn by inverting its
    cumulative distribution at two uniform numbers a position, so they depend neither on blocks nor on the device's
    random numbers.
    """
    uniform = torch.from_numpy(np.random.default_rng(seed).random((len(final), 2), dtype=np.float32)).to(final.device)
    gradient = torch.empty_like(final)
    for block in head_blocks(model, len(final)):
        with torch.no_grad():
            scores = logits(model, final[block]).float()
            labels = draw(scores.sub_(scores.amax(-1, keepdim=True)).exp_(), uniform[block])
        hidden = final[block].detach().requires_grad_()
        with torch.enable_grad():
            first, second = chosen_logits(model, hidden, labels).unbind(-1)
            difference = (first - second).sum() / math.sqrt(2)
        (gradient[block],) = torch.autograd.grad(difference, hidden)
    return gradient


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Labels i64 [m, k] with probabilities in proportion to `weights` [m, vocab]: the first whose cumulative share of
    them exceeds `uniform` [m, k]."""
    cumulative = weights.cumsum(-1)
    labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return labels.clamp_(max=weights.shape[-1] - 1)


def gradients(
    layer: nn.Module,
    below: Tensor,
    arguments: dict[str, Any],
    upstream: Tensor,
    visit: Visit,
    attend: Handler = causal,
    lent: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Carry the gradient `upstream` [1, n, d] at a layer's output back to its input `below` [1, n, d], and let `visit`
    see the attention in between; `attend` is the attention of the forward pass. Beside it, of a layer that attends to
    the keys and values of another one, the gradients [1, H, n, D] at these; where the layer is that other one, `lent`
    are the sums of those."""

    def watched(call: Attention) -> Tensor:
        output = attend(call)
        detached = replace(call, query=call.query.detach(), key=call.key.detach(), value=call.value.detach())
        # Autograd carries the gradient through W_O to the heads' outputs: `upstream` is u of `losses`, [Hq, n, D].
        output.register_hook(lambda upstream: visit(detached, upstream))  # type: ignore[no-untyped-call]
        return output

    # The forward pass kept no graph: this layer's is made anew from its input, and freed after use.
    inputs, borrowed = below.detach().requires_grad_(), list[Tensor]()
    if SHARED in arguments:
        pairs = {kind: [t.detach().requires_grad_() for t in pair] for kind, pair in arguments[SHARED].items()}
        borrowed = [tensor for pair in pairs.values() for tensor in pair]
        arguments = arguments | {SHARED: pairs}
    with torch.enable_grad(), unread_output(layer):
        output = through(layer, inputs, arguments, watched)
    own = [tensor for pair in arguments[SHARED].values() for tensor in pair] if lent else []
    found = torch.autograd.grad([output, *own], [inputs, *borrowed], [upstream, *lent])
    return found[0], list(found[1:])
