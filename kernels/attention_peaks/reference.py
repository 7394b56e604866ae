"""What the peaks are: float64, one row of one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompile.kernels.softmax import Softmax


def attention_peaks(
    query: Tensor, keys: Tensor, own_keys: Tensor, places: Tensor, scaling: float, window: int, softmax: Softmax
) -> Tensor:
    """See `api.attention_peaks`."""
    heads, length, _ = keys.shape
    most = torch.zeros(heads, length, dtype=torch.float64)
    column = torch.arange(length + own_keys.shape[1])
    for q, rows in enumerate(query.double()):
        h = q * heads // len(query)
        both = torch.cat([keys[h], own_keys[h]]).double()
        for row, place in zip(rows, places.tolist(), strict=True):
            seen = column <= place + length
            if window:
                seen &= column > place + length - window
            logits = softmax.bent(both @ row * scaling).masked_fill(~seen, -torch.inf)
            if softmax.sinks is not None:
                logits = torch.cat([logits, softmax.sinks[q].double()[None]])
            most[h] = torch.maximum(most[h], logits.softmax(0)[:length])
    return most.float()
