"""`attention_effects` in torch.

Let a row t attend with probabilities P[t, j], and let u_t be its gradient. Entry (t, j) contributes
S[t, j] = P[t, j] (u_t . v_j) to u_t . output, and with a set K of the tokens alone it becomes

    sum_K S[t] / sum_K P[t].

A learned sink is a token of every set K whose u_t . v_j is 0.

Shapes: H KV heads of G query heads each, n tokens of the context, m own ones, T rows, X sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.kernels.attention_effects.values import Asked, Changes, Effects, tables
from kvcompile.kernels.softmax import Softmax


def attention_effects(
    asked: Sequence[Asked],
    keys: Tensor,
    values: Tensor,
    changes: Changes,
    scaling: float,
    window: int,
    softmax: Softmax,
) -> list[Effects]:
    """See `api.attention_effects`."""
    keys, values = keys.float(), values.float()
    kept = tables(changes)
    # Other keys are another softmax; other values leave P as it is.
    changed = [keys + change for change in changes.keys]
    return [_effects(one, keys, changed, values, kept, changes, scaling, window, softmax) for one in asked]


def _effects(
    asked: Asked,
    keys: Tensor,
    changed: Sequence[Tensor],
    values: Tensor,
    kept: Tensor,
    changes: Changes,
    scaling: float,
    window: int,
    softmax: Softmax,
) -> Effects:
    heads, length, _ = keys.shape
    query = asked.query.float().unflatten(0, (heads, -1)) * scaling  # [H, G, T, D]
    u = asked.gradient.float().unflatten(0, (heads, -1))
    own_keys, own_values = asked.own_keys.float(), asked.own_values.float()
    column = torch.arange(length + own_keys.shape[1], device=keys.device)
    place = (asked.places + length)[:, None]
    seen = column <= place
    if window:
        seen = seen & (column > place - window)

    def attention(some: slice, stored: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = _times(query[:, :, some], torch.cat([stored, own_keys], dim=1).mT)
        return softmax.parted(logits, seen[some])

    every, some = slice(None), slice(None, None, asked.step)
    p, sink = attention(every, keys)  # [H, G, T, n + m]
    gain = _times(u, torch.cat([values, own_values], dim=1).mT)  # u_t . v_j
    effect = p * gain
    total = effect.sum(-1)  # [H, G, T]
    sets = kept.flatten(2)  # [H, n, X], X = P x budgets
    # sum_K P and sum_K S for all X sets at once; the follow-up's own tokens are in every set.
    mass = _times(p[..., :length], sets) + p[..., length:].sum(-1, keepdim=True)
    if sink is not None:  # which is never evicted, and has no effect of its own
        mass = mass + sink
    left = _times(effect[..., :length], sets) + effect[..., length:].sum(-1, keepdim=True)
    # The mass may underflow to 0 where a row looks at evicted tokens alone; the effect is then 0 too.
    moved = left / mass.clamp_min(torch.finfo(torch.float32).tiny) - total[..., None]
    # The group's errors add up. Nothing is lost where all is kept, whatever the order of summation says.
    evicted = moved.sum(1).masked_fill(sets.bool().all(1)[:, None], 0.0).unflatten(2, kept.shape[2:])
    by_keys = [(attention(some, k)[0] * gain[:, :, some]).sum(-1) - total[:, :, some] for k in changed]
    by_values = [(_times(p[..., :length], change.float()) * u).sum(-1) for change in changes.values]
    none = total[..., None][..., :0]
    return Effects(
        evicted,
        torch.stack(by_keys, -1).sum(1) if by_keys else none[:, :, some].sum(1),
        torch.stack(by_values, -1).sum(1) if by_values else none.sum(1),
        total.sum(1),
    )


def _times(rows: Tensor, other: Tensor) -> Tensor:
    """[H, G, T, n] times [H, n, X]: [H, G, T, X]."""
    return (rows.flatten(1, 2) @ other).unflatten(1, rows.shape[1:3])
