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

from kvcompile.kernels import Changes
from kvcompile.kernels.softmax import Softmax
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, Packed
from kvcompile.profile.losses import fitted_losses
from kvcompile.runtime.fitted import References, fit_head, reference_tokens
from kvcompile.runtime.rotation import Rotation
from kvcompile.stages import Rotary

PARTS = (1 / 32, 1 / 8, 1 / 2)
"""Of the window: the budgets at which losses are measured with fitted values."""

SHARE = 2
"""Which of `eviction.SHARES` these budgets have; others are taken to gain as much."""


def points(budgets: NDArray[np.int32]) -> NDArray[np.int64]:
    """Places i64 [R] among ascending `budgets`, the nearest to PARTS of the last one; each once."""
    apart = np.abs(np.log(budgets) - np.log(budgets[-1] * np.array(PARTS))[:, None])
    return np.unique(apart.argmin(1))


@dataclass(frozen=True, eq=False)
class Fitting:
    """How the values of a layer are fitted: reference queries f32 [num_heads, r, D] after the context, what multiplies
    their logits, and how these become weights."""

    query: Tensor
    scaling: float
    softmax: Softmax

    @classmethod
    def of(cls, call: Attention, queries: Tensor, length: int, rotary: Rotary) -> Fitting:
        """For a layer that attends as in `call`; `queries` are the `references` of a context of `length` tokens, and
        `rotary` is a table of one layer."""
        rotation = Rotation.of(rotary.frequency[0], rotary.partner, queries.device)
        lengths = torch.tensor([length], device=queries.device)
        found = References(queries[None], reference_tokens(lengths, len(queries) // len(call.key)))
        return cls(found.after(rotation, lengths)[0], call.scaling, call.softmax)

    def values(self, head: int, key: Tensor, value: Tensor, kept: Tensor) -> Tensor:
        """Values [n, D] of a KV head of the layer `key` and `value` [H, n, D], of which those of the tokens `kept` bool
        [n] are fitted."""
        group = len(self.query) // len(key)
        own, chosen = self.query[head * group : (head + 1) * group], kept.nonzero()[:, 0]
        softmax = self.softmax.of(slice(head, head + 1), group)
        new = value[head].clone()
        new[chosen] = fit_head(own, key[head], value[head], chosen, self.scaling, softmax).to(new.dtype)
        return new


def losses_at(
    fitting: Fitting, call: Attention, gradient: Tensor, context: Context, packed: Packed, kept: Sequence[Tensor]
) -> dict[str, NDArray[np.float64]]:
    """Predicted losses by the follow-ups' kind, float64 [H, R], of a layer whose heads keep `kept` bool [H, n] tokens
    and have their values fitted, for each of R such choices."""
    (keys,), (values,) = context.keys, context.values
    each = []
    for alive in kept:
        new = torch.stack([fitting.values(h, keys, values, alive[h]) for h in range(len(keys))]).float()
        changes = Changes((~alive[..., None]).int(), 1, (), (values.float() - new,))
        each.append(fitted_losses(call, gradient, keys, new, packed, changes))
    return {kind: np.stack([one[kind] for one in each], axis=-1) for kind in each[0]}


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
