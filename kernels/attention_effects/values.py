"""What `attention_effects` takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Asked:
    """Rows of one follow-up to a context, whose m own tokens see all of it and themselves causally.

    `query` and `gradient` [num_heads, T, D]: queries, and the gradient with respect to attention's output.
    `own_keys` and `own_values` [H, m, D]. `places` int64 [T]: which of the own tokens each row is. Of the rows, every
    `step`-th is looked at with other keys, each of which is another softmax."""

    query: Tensor
    gradient: Tensor
    own_keys: Tensor
    own_values: Tensor
    places: Tensor
    step: int = 1
    memo: dict[torch.dtype, Any] = field(default_factory=dict, repr=False)
    """What an implementation makes of it once, by the dtype that it multiplies in."""


@dataclass(frozen=True, eq=False)
class Changes:
    """What is done to a context of n tokens.

    `entry` int32 [H, n, P]: with which of `budgets` budgets, which grow, a token comes to be kept, in P ways to choose;
    `budgets` where it never does. `keys` and `values`, f32 [H, n, D] each: what is added to all of them instead."""

    entry: Tensor
    budgets: int
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Effects:
    """By how much each change moves the output of a KV head's group along the gradient, float32: `evicted`
    [H, T, P, budgets], `values` [H, T, number of changes], and `keys` the same of every `step`-th row; `total` [H, T]
    is where along it the output is without a change."""

    evicted: Tensor
    keys: Tensor
    values: Tensor
    total: Tensor


def tables(changes: Changes) -> Tensor:
    """Which tokens are kept, 1 and 0: float32 [H, n, P, budgets]."""
    return (changes.entry[..., None] <= torch.arange(changes.budgets, device=changes.entry.device)).float()
