"""The bytes that one choice a head leaves, given to the heads whose curves fall fastest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.choices import Choices


def top_up(table: Choices, choice: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Tokens of every head [N]: those of its choice, and more for the heads whose mean loss falls fastest a byte."""
    share, place, k, v = np.unravel_index(choice, table.shape)
    size = table.size.reshape(table.shape)
    mean = table.loss.mean(0).reshape(-1, *table.shape)
    tokens, left = table.tokens[place].copy(), budget - int(table.size[choice].sum())
    heads = np.arange(len(place))
    while left > 0 and len(table.tokens) > 1:
        # A step goes to the next number of tokens with a measured loss, [N]: bytes, loss and bytes a slot.
        after = np.minimum(place + 1, len(table.tokens) - 1)
        more = size[share, after, k, v] - size[share, place, k, v]
        gain = mean[heads, share, place, k, v] - mean[heads, share, after, k, v]
        slot = more // np.maximum(table.tokens[after] - table.tokens[place], 1)
        rate = np.where((more > 0) & (slot <= left), gain / np.maximum(more, 1), -1.0)
        head = int(rate.argmax())
        if rate[head] <= 0:
            break
        step = min(int(table.tokens[after[head]] - table.tokens[place[head]]), int(left // slot[head]))
        tokens[head] += step
        left -= step * int(slot[head])
        if tokens[head] < table.tokens[after[head]]:
            break  # what is left is less than a step of the head that gains most
        place[head] = after[head]
    return tokens
