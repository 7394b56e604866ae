"""All losses of one layer in one episode: of fewer tokens, with values as they are and fitted, and of every codec,
among all tokens and among those that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.kernels import Asked, Changes, Effects
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, Packed
from kvcompile.profile.fitted import SHARE, STORED, Kept
from kvcompile.profile.losses import Table, effects, losses_between, losses_of
from kvcompile.profile.quantised import Errors
from kvcompile.profile.references import HeadLook


def layer_losses(
    call: Attention,
    asked: Sequence[Asked],
    context: Context,
    packed: Packed,
    looks: Sequence[HeadLook],
    entry: Tensor,
    budgets: int,
    at: NDArray[np.int64],
    errors: tuple[Errors, Errors],
) -> dict[str, Table]:
    """By their names among the sums of `Curves`, the tables [H, ...] by the follow-ups' kind. `entry` int32 [H, n, P]
    says with which of so many `budgets` a token comes to be kept, `at` with which of them values are fitted; `errors`
    are those of keys and of values."""
    (keys,), (values,) = context.keys, context.values
    of_keys, of_values = errors[0].of(keys), errors[1].of(values)
    whole = effects(call, asked, context, Changes(entry, budgets, of_keys, of_values))
    lost = losses_of(packed, whole)
    found = {"loss": lost.evicted, "key_loss": lost.keys, "value_loss": lost.values}
    kept = {"fitted_loss": list[Table](), "kept_key_loss": list[Table](), "kept_value_loss": list[Table]()}
    for number, budget in enumerate(at.tolist()):
        one = Kept.of(entry[..., SHARE] <= budget, looks)
        left, stored = one.context(keys), number < STORED
        # Keys are quantised one by one, so those of kept tokens as before; values are others than they were.
        changes = (tuple(map(one.of_kept, of_keys)), errors[1].of(left.values[0])) if stored else ((), ())
        effect = _left(call, asked, left, *changes)
        kept["fitted_loss"].append(losses_between(packed, whole, effect))
        if stored:
            lost = losses_of(packed, effect)
            kept["kept_key_loss"].append(lost.keys)
            kept["kept_value_loss"].append(lost.values)
    return found | {name: _stacked(each) for name, each in kept.items()}


def _left(
    call: Attention, asked: Sequence[Asked], left: Context, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]
) -> list[Effects]:
    """The effects of other keys and values on what is left of a layer's context, of which nothing more is evicted."""
    (stored,) = left.keys
    all_kept = torch.zeros(*stored.shape[:2], 1, dtype=torch.int32, device=stored.device)
    return effects(call, asked, left, Changes(all_kept, 1, keys, values))


def _stacked(each: Sequence[Table]) -> Table:
    """Of R choices of tokens as [H, R, ...]."""
    return {kind: np.stack([one[kind] for one in each], axis=1) for kind in each[0]}
