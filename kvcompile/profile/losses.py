"""From attention and gradients to losses: tensors in, tensors out, nothing about models.

Let a row t of a follow-up attend with probabilities P[t, j], and let u_t be the gradient (of what `fisher` says) with
respect to that head's attention output at t: W_O^T times the gradient at the residual stream. Entry (t, j) contributes
S[t, j] = P[t, j] (u_t . v_j) to the first-order effect of the output, and keeping only a set K of the context's tokens,
with the softmax renormalised over them and the follow-up's own, changes what u is the gradient of by

    err[t] = sum_K S[t] / sum_K P[t] - sum S[t],         summed over the query heads that share the KV head.

Stored with fewer bits, K and V change P and S themselves, and err is the difference of their sums: see
`kernels.attention_effects`. With labels sampled from the model, E[err^2] is the quadratic form of that change in the
true Fisher matrix, which is the Hessian of the KL divergence. Taken block-diagonal over heads and over t, the predicted
KL is

    loss = 1/2 mean_t err[t]^2        nats a token.

Shapes: H KV heads of G query heads each, n tokens of the context, M packed rows, D components, P ways to choose tokens,
C budgets, Q codecs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.kernels import Asked, Changes, Effects, attention_effects
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Block, Context, Packed, judged

ROWS = 128
"""Judged rows of a follow-up that are looked at."""

MANY = 64
"""Of so many rows or more, every second one is looked at with other keys: each codec of keys is another softmax."""


Table = dict[str, NDArray[np.float64]]
"""Losses by the follow-ups' kind."""


@dataclass(frozen=True)
class Losses:
    """Predicted losses of one layer in one episode by the follow-ups' kind, float64: `evicted` [H, P, C], `keys` and
    `values` [H, Q]."""

    evicted: Table
    keys: Table
    values: Table


def asked_of(call: Attention, gradient: Tensor, packed: Packed) -> list[Asked]:
    """The rows of every follow-up that are looked at; `gradient` [Hq, M, D] is u over the packed rows."""
    return [_asked(call, gradient, block) for block in packed.blocks]


def effects(call: Attention, asked: Sequence[Asked], context: Context, changes: Changes) -> list[Effects]:
    """What all `changes` to a layer's context do to every follow-up."""
    keys, values = context.keys[call.layer], context.values[call.layer]
    return attention_effects(asked, keys, values, changes, call.scaling, call.window or 0, call.softmax)


def losses_of(packed: Packed, found: Sequence[Effects]) -> Losses:
    """The losses of all changes."""
    kinds = [block.kind for block in packed.blocks]
    return Losses(*(_means(kinds, [getattr(one, name) for one in found]) for name in ("evicted", "keys", "values")))


def losses(call: Attention, gradient: Tensor, context: Context, packed: Packed, changes: Changes) -> Losses:
    """The losses of all `changes` to a layer's context."""
    return losses_of(packed, effects(call, asked_of(call, gradient, packed), context, changes))


def losses_between(packed: Packed, whole: Sequence[Effects], left: Sequence[Effects]) -> Table:
    """Losses by the follow-ups' kind, float64 [H], of what is `left` of a context in place of the whole."""
    errors = [one.total - other.total for one, other in zip(left, whole, strict=True)]
    return _means([block.kind for block in packed.blocks], errors)


def _asked(call: Attention, gradient: Tensor, block: Block) -> Asked:
    places = judged(block, ROWS).to(gradient.device)
    own = slice(block.start, block.stop)
    rows = call.query[:, places], gradient[:, places], call.key[:, own], call.value[:, own], places - block.start
    return Asked(*rows, 2 if len(places) >= MANY else 1)


def _means(kinds: Sequence[str], errors: Sequence[Tensor]) -> Table:
    """1/2 mean over rows of squared errors [H, T, ...], float64 [H, ...]; follow-ups of one kind count alike, however
    many rows each has."""
    # Losses span many orders of magnitude: in float32, squares below 1e-38 would vanish.
    each = [error.double().square().mean(1) / 2 for error in errors]
    return {
        kind: torch.stack([loss for of, loss in zip(kinds, each, strict=True) if of == kind]).mean(0).cpu().numpy()
        for kind in dict.fromkeys(kinds)
    }
