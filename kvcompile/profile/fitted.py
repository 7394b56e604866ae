"""Values fitted as the runtime fits those of a prompt's kept tokens (`kvcompile.runtime.fitted`): what is lost then.

Losses with fitted values are measured at a few budgets. In between, what they are of the loss without, which is known
at every budget, is taken to change with a power of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.profile.context import Context
from kvcompile.profile.references import HeadLook

PARTS = (1 / 32, 1 / 8, 1 / 2)
"""Of the window: the budgets at which losses are measured with fitted values."""

STORED = 2
"""At so many of them, the first ones, losses of codecs are measured too: of the last it would take most of the time."""

SHARE = 2
"""Which of `eviction.SHARES` these budgets have; others are taken to gain as much."""


def points(budgets: NDArray[np.int32]) -> NDArray[np.int64]:
    """Places i64 [R] among ascending `budgets`, the nearest to PARTS of the last one; each once."""
    apart = np.abs(np.log(budgets) - np.log(budgets[-1] * np.array(PARTS))[:, None])
    return np.unique(apart.argmin(1))


@dataclass(frozen=True, eq=False)
class Kept:
    """Tokens that the heads of a layer keep, `alive` bool [H, n], as many each, and all `values` f32 [H, n, D] with
    those of kept tokens fitted."""

    alive: Tensor
    values: Tensor

    @classmethod
    def of(cls, alive: Tensor, looks: Sequence[HeadLook]) -> Kept:
        """Of a layer whose heads look so."""
        return cls(alive, torch.stack([look.values(own) for look, own in zip(looks, alive, strict=True)]).float())

    def context(self, keys: Tensor) -> Context:
        """What is left of the layer's context, with its `keys` [H, n, D]."""
        return Context([], [self.of_kept(keys)], [self.of_kept(self.values)])

    def of_kept(self, vectors: Tensor) -> Tensor:
        """Those of the kept tokens, of `vectors` [H, n, D]."""
        token = self.alive.nonzero()[:, 1].view(len(vectors), -1, 1).expand(-1, -1, vectors.shape[2])
        return vectors.gather(1, token)


def with_fitted(
    loss: NDArray[np.float64], fitted: NDArray[np.float64], budgets: NDArray[np.int32], scored: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """`loss` [..., P, C] of eviction alone, as it is with fitted values in the `scored` [P] ways to choose tokens;
    `fitted` [..., R] was measured at the `points` of the budgets [C]."""
    at = points(budgets)
    plain = loss[..., SHARE, at]
    # Where nothing is lost, as in heads that look at nothing far away, there is no ratio.
    known = (plain > 0) & (fitted > 0)
    ratio = np.log(np.where(known, fitted, 1) / np.where(known, plain, 1))
    flat = [np.interp(np.log(budgets), np.log(budgets[at]), one) for one in ratio.reshape(-1, len(at))]
    factor = np.exp(np.reshape(flat, (*loss.shape[:-2], 1, len(budgets))))
    return np.where(scored[:, None], loss * factor, loss)
