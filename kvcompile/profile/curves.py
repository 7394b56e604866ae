"""From attention and gradients to losses: tensors in, tensors out, nothing about models.

Let a row t of a follow-up attend with probabilities P[t, j], and let u_t be the gradient of the log-likelihood with
respect to that head's attention output at t: W_O^T times the gradient at the residual stream. Entry (t, j) contributes
S[t, j] = P[t, j] (u_t . v_j) to the first-order effect of the output, and keeping only a set K of the context's tokens,
with the softmax renormalised over them and the follow-up's own, changes the log-likelihood by

    err[t] = sum_K S[t] / sum_K P[t] - sum S[t],         summed over the query heads that share the KV head.

Stored with fewer bits, K and V change P and S themselves, and err is the difference of their sums. With labels sampled
from the model, E[err^2] is the quadratic form of that change in the true Fisher matrix, which is the Hessian of the KL
divergence. Taken block-diagonal over heads and over t, the predicted KL is

    loss = 1/2 mean_t err[t]^2        nats a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, Packed, judged_rows

POINTS = 28
"""Budgets on a curve, before those that fall on the same number of tokens are merged."""

ROWS = 128
"""Judged rows of a follow-up that are looked at."""

SHARES = (1.0, 0.5, 0.25, 0.0625)
"""Parts of a budget that are a ring of recent tokens: 1 is the policy `recent`, the others are `scored`."""

BITS = (8, 4)
"""Widths beside the cache's own type."""


def budget_grid(window: int, sink: int, points: int = POINTS) -> NDArray[np.int32]:
    """Ascending budgets in tokens, i32 [C], C <= points: geometric from sink + 1 to the window."""
    return np.unique(np.geomspace(sink + 1, window, points).round().astype(np.int32))


def ring(budget: int, share: float, sink: int) -> int:
    """Tokens of a budget that are a ring of recent ones."""
    return min(max(round(share * (budget - sink)), 1), budget - sink)


def survivors(score: Tensor, budget: int, recent: int, sink: int) -> Tensor:
    """Which tokens a head keeps, bool [H, n]: `sink` first ones, `recent` last ones, and of the others the best by
    `score` [H, n], `budget` in all."""
    length = score.shape[1]
    keep = torch.zeros_like(score, dtype=torch.bool)
    if budget >= length:
        return ~keep
    keep[:, :sink] = True
    keep[:, length - recent :] = True
    heavy = budget - sink - recent
    if heavy > 0:
        best = score[:, sink : length - recent].topk(heavy, dim=1).indices
        keep.scatter_(1, best + sink, True)
    return keep


def keep_table(score: Tensor, budgets: NDArray[np.int32], sink: int) -> Tensor:
    """Survivors for every share and budget as 0 and 1, float32 [H, n, P, C]."""
    shares = [
        torch.stack([survivors(score, int(b), ring(int(b), share, sink), sink) for b in budgets], dim=-1)
        for share in SHARES
    ]
    return torch.stack(shares, dim=-2).float()


@dataclass(frozen=True)
class Stored:
    """What reading back narrower elements gives, float32 [H, n, D] each, in the order of `BITS`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Losses:
    """Predicted losses of one layer in one episode by the follow-ups' kind, float64: `evicted` [H, P, C], `keys` and
    `values` [H, Q]."""

    evicted: dict[str, NDArray[np.float64]]
    keys: dict[str, NDArray[np.float64]]
    values: dict[str, NDArray[np.float64]]


def losses(call: Attention, gradient: Tensor, context: Context, packed: Packed, kept: Tensor, stored: Stored) -> Losses:
    """All losses of a layer; `gradient` [Hq, M, D] is u over the packed rows, `kept` as `keep_table` gives it."""
    values = context.values[call.layer].float()
    num_kv_heads, length, head_dim = values.shape
    tables = kept.flatten(2)
    whole = tables.bool().all(1)[:, None]
    evicted: dict[str, list[Tensor]] = {}
    narrow_keys: dict[str, list[Tensor]] = {}
    narrow_values: dict[str, list[Tensor]] = {}
    changed = [judged_rows(call, context, packed, ROWS, keys=keys) for keys in stored.keys]
    for block, rows, *others in zip(packed.blocks, judged_rows(call, context, packed, ROWS), *changed, strict=True):
        own = call.value[:, block.start : block.stop].float()
        u = gradient[:, rows.places].float().reshape(num_kv_heads, -1, len(rows.places), head_dim)
        worth = _worth(u, torch.cat([values, own], dim=1))
        p = rows.probability
        effect = p * worth
        total = effect.sum(-1).sum(1)
        past, rest = slice(0, length), slice(length, None)
        mass = _times(p[..., past], tables) + p[..., rest].sum(-1, keepdim=True)
        gain = _times(effect[..., past], tables) + effect[..., rest].sum(-1, keepdim=True)
        error = (gain / mass.clamp_min(torch.finfo(torch.float32).tiny)).sum(1) - total[..., None]
        # Nothing is lost where all is kept, whatever the order of summation says.
        evicted.setdefault(block.kind, []).append(_loss(error.masked_fill(whole, 0.0)))

        by_keys = [(other.probability * worth).sum(-1).sum(1) - total for other in others]
        narrow_keys.setdefault(block.kind, []).append(_loss(torch.stack(by_keys, dim=-1)))
        by_values = [(_times(p[..., past], v - values) * u).sum(-1).sum(1) for v in stored.values]
        narrow_values.setdefault(block.kind, []).append(_loss(torch.stack(by_values, dim=-1)))
    shape = kept.shape[2:]
    return Losses(
        {kind: mean.reshape(num_kv_heads, *shape) for kind, mean in _means(evicted).items()},
        _means(narrow_keys),
        _means(narrow_values),
    )


def _worth(u: Tensor, values: Tensor) -> Tensor:
    """u_t . v_j, [H, G, T, n]."""
    return (u.flatten(1, 2) @ values.mT).view(*u.shape[:3], -1)


def _times(rows: Tensor, tables: Tensor) -> Tensor:
    """[H, G, T, n] times [H, n, X]: [H, G, T, X]."""
    return (rows.flatten(1, 2) @ tables).view(*rows.shape[:3], -1)


def _loss(error: Tensor) -> Tensor:
    """1/2 mean over rows of the squared error [H, T, X]: float64 [H, X]."""
    return error.double().square().mean(1) / 2


def _means(parts: dict[str, list[Tensor]]) -> dict[str, NDArray[np.float64]]:
    return {kind: torch.stack(tensors).mean(0).cpu().numpy() for kind, tensors in parts.items()}
