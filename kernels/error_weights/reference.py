"""What the weights are: float64, one row of one head at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompile.kernels.error_weights.values import Rows, Weights
from kvcompile.kernels.softmax import Softmax


def error_weights(
    asked: Sequence[Rows],
    keys: Tensor,
    values: Tensor,
    metric: Tensor,
    scaling: float,
    window: int,
    softmax: Softmax,
) -> list[Weights]:
    """See `api.error_weights`."""
    return [_of_one(rows, keys, values, metric, scaling, window, softmax) for rows in asked]


def _of_one(
    rows: Rows, keys: Tensor, values: Tensor, metric: Tensor, scaling: float, window: int, softmax: Softmax
) -> Weights:
    heads, length, _ = keys.shape
    by_key, by_value = torch.zeros(2, heads, length, dtype=torch.float64)
    by_query = torch.zeros(rows.query.shape[:2], dtype=torch.float64)
    by_output = torch.zeros(len(rows.query), dtype=torch.float64)
    column = torch.arange(length + rows.own_keys.shape[1])
    for q, queries in enumerate(rows.query.double()):
        h = q * heads // len(rows.query)
        both, v, m = torch.cat([keys[h], rows.own_keys[h]]).double(), values[h].double(), metric[q].double()
        for t, place in enumerate(rows.places.tolist()):
            seen = column <= place + length
            if window:
                seen &= column > place + length - window
            logits = softmax.bent(both @ queries[t] * scaling).masked_fill(~seen, -torch.inf)
            if softmax.sinks is not None:
                logits = torch.cat([logits, softmax.sinks[q].double()[None]])
            p = logits.softmax(0)[:length]
            apart = v - p @ v
            squared = p.square().index_fill(0, torch.tensor([0]), 0)
            weight = squared * ((apart @ m) * apart).sum(-1)
            by_key[h] += weight
            by_value[h] += squared
            by_query[q, t] = weight.sum()
            by_output[q] += squared.sum()
    return Weights(by_key.float(), by_value.float(), by_query.float(), by_output.float())
