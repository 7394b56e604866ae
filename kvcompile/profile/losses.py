"""From attention and gradients to losses: tensors in, tensors out, nothing about models.

Let a row t of a follow-up attend with probabilities P[t, j], and let u_t be the gradient of the log-likelihood with
respect to that head's attention output at t: W_O^T times the gradient at the residual stream. Entry (t, j) contributes
S[t, j] = P[t, j] (u_t . v_j) to the first-order effect of the output, and keeping only a set K of the context's tokens,
with the softmax renormalised over them and the follow-up's own, changes the log-likelihood by

    err[t] = sum_K S[t] / sum_K P[t] - sum S[t],         summed over the query heads that share the KV head.

A learned sink is a token of every set K whose u_t . v_j is 0.

Stored with fewer bits, K and V change P and S themselves, and err is the difference of their sums. With labels sampled
from the model, E[err^2] is the quadratic form of that change in the true Fisher matrix, which is the Hessian of the KL
divergence. Taken block-diagonal over heads and over t, the predicted KL is

    loss = 1/2 mean_t err[t]^2        nats a token.

Shapes: H KV heads of G query heads each, n tokens of the context, T judged rows, D components, X sets of tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, Packed, judged_rows

ROWS = 128
"""Judged rows of a follow-up that are looked at."""

MANY = 64
"""Of so many rows or more, every second one is looked at with other keys: each codec of keys is another softmax."""


@dataclass(frozen=True)
class ReadBack:
    """A layer's keys and values as they are read back from each codec that is measured, float32 [H, n, D] each."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Losses:
    """Predicted losses of one layer in one episode by the follow-ups' kind, float64: `evicted` [H, P, C], `keys` and
    `values` [H, Q]."""

    evicted: dict[str, NDArray[np.float64]]
    keys: dict[str, NDArray[np.float64]]
    values: dict[str, NDArray[np.float64]]


def losses(
    call: Attention, gradient: Tensor, context: Context, packed: Packed, kept: Tensor, read_back: ReadBack
) -> Losses:
    """All losses of a layer; `gradient` [Hq, M, D] is u over the packed rows, `kept` [H, n, P, C] is 1 for the tokens
    that a head keeps and 0 for others."""
    values = context.values[call.layer].float()
    num_kv_heads, length, head_dim = values.shape
    tables = kept.flatten(2)  # [H, n, X], X = P x C
    whole = tables.bool().all(1)[:, None]
    evicted: dict[str, list[Tensor]] = {}
    quantised_keys: dict[str, list[Tensor]] = {}
    quantised_values: dict[str, list[Tensor]] = {}
    # Other keys are another softmax, P'; other values leave P as it is.
    changed = [judged_rows(call, context, packed, ROWS, keys=keys, every=_every) for keys in read_back.keys]
    for block, rows, *others in zip(packed.blocks, judged_rows(call, context, packed, ROWS), *changed, strict=True):
        own = call.value[:, block.start : block.stop].float()
        u = gradient[:, rows.places].float().reshape(num_kv_heads, -1, len(rows.places), head_dim)
        gain = _gain(u, torch.cat([values, own], dim=1))
        p = rows.probability
        effect = p * gain  # S
        total = effect.sum(-1).sum(1)  # [H, T]: over j, then over the group, whose errors add up before the square
        past, rest = slice(0, length), slice(length, None)
        # sum_K P and sum_K S for all X sets at once; the follow-up's own tokens are in every set.
        kept_mass = _times(p[..., past], tables) + p[..., rest].sum(-1, keepdim=True)
        if rows.sink is not None:  # which is never evicted, and has no effect of its own
            kept_mass = kept_mass + rows.sink
        kept_effect = _times(effect[..., past], tables) + effect[..., rest].sum(-1, keepdim=True)
        # The mass may underflow to 0 where a row looks at evicted tokens alone; the effect is then 0 too.
        error = (kept_effect / kept_mass.clamp_min(torch.finfo(torch.float32).tiny)).sum(1) - total[..., None]
        # Nothing is lost where all is kept, whatever the order of summation says.
        evicted.setdefault(block.kind, []).append(_loss(error.masked_fill(whole, 0.0)))

        # err[t] = sum_j (P'[t, j] - P[t, j]) (u_t . v_j)
        some = slice(None, None, _every(len(rows.places)))
        by_keys = [(other.probability * gain[:, :, some]).sum(-1).sum(1) - total[:, some] for other in others]
        quantised_keys.setdefault(block.kind, []).append(_loss(torch.stack(by_keys, dim=-1)))
        # err[t] = u_t . sum_j P[t, j] (v'_j - v_j)
        by_values = [(_times(p[..., past], v - values) * u).sum(-1).sum(1) for v in read_back.values]
        quantised_values.setdefault(block.kind, []).append(_loss(torch.stack(by_values, dim=-1)))
    shape = kept.shape[2:]
    return Losses(
        {kind: mean.reshape(num_kv_heads, *shape) for kind, mean in _means(evicted).items()},
        _means(quantised_keys),
        _means(quantised_values),
    )


def _every(count: int) -> int:
    return 2 if count >= MANY else 1


def _gain(u: Tensor, values: Tensor) -> Tensor:
    """u_t . v_j [H, G, T, n]: what the log-likelihood gains from a unit of attention on token j."""
    return (u.flatten(1, 2) @ values.mT).view(*u.shape[:3], -1)


def _times(rows: Tensor, tables: Tensor) -> Tensor:
    """[H, G, T, n] times [H, n, X]: [H, G, T, X]."""
    return (rows.flatten(1, 2) @ tables).view(*rows.shape[:3], -1)


def _loss(error: Tensor) -> Tensor:
    """1/2 mean over rows of the squared error [H, T, X]: float64 [H, X]."""
    # Losses span many orders of magnitude: in float32, squares below 1e-38 would vanish.
    return error.double().square().mean(1) / 2


def _means(parts: dict[str, list[Tensor]]) -> dict[str, NDArray[np.float64]]:
    """Follow-ups of one kind count alike, however many rows each has."""
    return {kind: torch.stack(tensors).mean(0).cpu().numpy() for kind, tensors in parts.items()}
