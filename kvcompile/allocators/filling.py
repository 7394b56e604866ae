"""The bytes that a few classes a layer leave, given to whole classes, so that their number stays.

All layers' classes follow from one price of a byte, and a layer's step from one set of classes to the next is large: at
the lowest price whose plan fits, a tenth of the target can be left.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvcompile.allocators.choices import Choices
from kvcompile.stages import WORST


def fill_classes(table: Choices, choice: NDArray[np.int64], budget: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choices and tokens of every head, both [N], of a lower objective than those of `choice` [N], within `budget`
    bytes; heads of a layer that shared a choice share the new one, and their number of tokens."""
    _, owner = np.unique(np.stack([table.heads[:, 0], choice]), axis=1, return_inverse=True)
    owner = owner.ravel()
    _, first, members = np.unique(owner, return_index=True, return_counts=True)
    current = choice[first]
    # What a class loses in every family under every choice, [F, G, X] for G classes: the sum over its heads.
    loss = np.zeros((len(table.loss), len(members), table.loss.shape[2]))
    for head, group in enumerate(owner):
        loss[:, group] += table.loss[:, head]
    current = _exchanged(loss, members, table.size, current, budget)
    tokens = _stretched(table, loss, members, current, budget)
    return current[owner], tokens[owner]


def _exchanged(
    loss: NDArray[np.float64],
    members: NDArray[np.int64],
    size: NDArray[np.int64],
    current: NDArray[np.int64],
    budget: int,
) -> NDArray[np.int64]:
    """The choice of every class [G] after exchanges, each the one that fits and lowers the objective most a byte."""
    current, each = current.copy(), np.arange(len(current))
    while True:
        left = budget - int(members @ size[current])
        # Exchange (g, x) takes `more[g, x]` bytes, [G, X], and moves the families' losses by `change`, [F, M].
        more = members[:, None] * (size - size[current][:, None])
        group, new = np.nonzero(more <= left)
        before = loss[:, each, current]
        change = loss[:, group, new] - before[:, group]
        gain = _gain(before.sum(1), change)
        rate = gain / np.maximum(more[group, new], 1)
        best = int(rate.argmax())
        if gain[best] <= 1e-12 * before.sum():
            return current
        current[group[best]] = new[best]


def _stretched(
    table: Choices,
    loss: NDArray[np.float64],
    members: NDArray[np.int64],
    current: NDArray[np.int64],
    budget: int,
) -> NDArray[np.int64]:
    """The tokens of every class [G]: those of its choice, and more on the way to the next number of tokens with a
    measured loss, which is linear in between."""
    share, place, k, v = np.unravel_index(current, table.shape)
    after = np.minimum(place + 1, len(table.tokens) - 1)
    ahead = np.ravel_multi_index((share, after, k, v), table.shape)
    tokens, each = table.tokens[place].copy(), np.arange(len(current))
    span = np.maximum(table.tokens[after] - table.tokens[place], 1)
    slot = members * ((table.size[ahead] - table.size[current]) // span)
    left = budget - int(members @ table.size[current])
    total, step = loss[:, each, current].sum(1), loss[:, each, ahead] - loss[:, each, current]
    while True:
        # Tokens that still fit, [G]; a class that has been stretched, or is full, takes none.
        fit = np.where(tokens == table.tokens[place], np.minimum(left // np.maximum(slot, 1), span - 1), 0)
        fit = np.where(after > place, fit, 0)
        change = step * fit / span
        gain = _gain(total, change)
        rate = np.where(fit > 0, gain / np.maximum(fit * slot, 1), 0.0)
        best = int(rate.argmax())
        if rate[best] <= 0:
            return tokens
        tokens[best] += fit[best]
        left -= int(fit[best] * slot[best])
        total = total + change[:, best]


def _gain(total: NDArray[np.float64], change: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much each of M `change`s [F, M] of the families' losses `total` [F] lowers the objective, [M]."""
    after = total[:, None] + change
    return np.asarray(total.mean() + WORST * total.max() - after.mean(0) - WORST * after.max(0))
