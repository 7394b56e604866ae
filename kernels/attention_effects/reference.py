"""What attention's effects are: float64, one head, row and change at a time."""

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
    kept, (heads, length, _) = tables(changes).bool(), keys.shape
    every, found = torch.ones(length, dtype=torch.bool), []
    for one in asked:
        rows, some = len(one.places), range(0, len(one.places), one.step)
        evicted = torch.zeros(heads, rows, *kept.shape[2:], dtype=torch.float64)
        by_keys = torch.zeros(heads, len(some), len(changes.keys), dtype=torch.float64)
        by_values = torch.zeros(heads, rows, len(changes.values), dtype=torch.float64)
        total = torch.zeros(heads, rows, dtype=torch.float64)
        for q in range(len(one.query)):
            h = q * heads // len(one.query)
            for t in range(rows):
                args = one, q, h, t, scaling, window, softmax
                whole = _along(keys[h], values[h], every, *args)
                total[h, t] += whole
                for p, c in torch.cartesian_prod(*map(torch.arange, kept.shape[2:])).tolist():
                    evicted[h, t, p, c] += _along(keys[h], values[h], kept[h, :, p, c], *args) - whole
                for y, change in enumerate(changes.values):
                    by_values[h, t, y] += _along(keys[h], values[h] + change[h], every, *args) - whole
                for x, change in enumerate(changes.keys if t in some else ()):
                    by_keys[h, some.index(t), x] += _along(keys[h] + change[h], values[h], every, *args) - whole
        found.append(Effects(evicted.float(), by_keys.float(), by_values.float(), total.float()))
    return found


def _along(
    keys: Tensor, values: Tensor, kept: Tensor, one: Asked, q: int, h: int, t: int, scaling: float, window: int,
    softmax: Softmax,
) -> Tensor:  # fmt: skip
    """u . output of row t of query head q, over the tokens of the context that are kept and its own."""
    place = int(one.places[t])
    seen = torch.cat([kept, torch.arange(one.own_keys.shape[1]) <= place])
    if window:
        seen &= torch.arange(len(seen)) > place + len(kept) - window
    k = torch.cat([keys, one.own_keys[h]])[seen].double()
    v = torch.cat([values, one.own_values[h]])[seen].double()
    logits = softmax.bent(k @ one.query[q, t].double() * scaling)
    every = logits if softmax.sinks is None else torch.cat([logits, softmax.sinks[q].double()[None]])
    return one.gradient[q, t].double() @ (every.softmax(0)[: len(logits)] @ v)
