"""The checked entry point."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvcompile.kernels.attention_effects import dense
from kvcompile.kernels.attention_effects.values import Asked, Changes, Effects
from kvcompile.kernels.native import effects
from kvcompile.kernels.softmax import PLAIN, Softmax


def attention_effects(
    asked: Sequence[Asked],
    keys: Tensor,
    values: Tensor,
    changes: Changes,
    scaling: float,
    window: int = 0,
    softmax: Softmax = PLAIN,
) -> list[Effects]:
    """Effects of changes to a context on each of several follow-ups.

    Without tokens the softmax is renormalised over those that are left and the follow-up's own, which are never
    evicted; nothing is lost where all are kept.

    Args:
        asked: the follow-ups' rows.
        keys, values: [H, n, D], rotary embedding applied.
        changes: sets of tokens kept, other keys, and other values, each for itself.
        scaling: factor on the logits.
        window: columns that a row sees, its own included; 0 for all of them.
        softmax: how logits become weights.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if keys.shape != values.shape or changes.entry.shape[:2] != keys.shape[:2]:
        raise ValueError(
            f"keys {tuple(keys.shape)}, values {tuple(values.shape)} and entry {tuple(changes.entry.shape)}: "
            "expected as many heads and tokens"
        )
    if any(changed.shape != keys.shape for changed in (*changes.keys, *changes.values)):
        raise ValueError(f"changes of keys and values are to be {tuple(keys.shape)}, as these are")
    for rows in asked:
        if rows.query.shape != rows.gradient.shape or rows.query.shape[0] % keys.shape[0]:
            raise ValueError(
                f"query {tuple(rows.query.shape)} and gradient {tuple(rows.gradient.shape)}: expected the same, with a "
                f"multiple of {keys.shape[0]} heads"
            )
    if effects.usable(asked, keys, window, softmax):
        return effects.attention_effects(asked, keys, values, changes, scaling)
    return dense.attention_effects(asked, keys, values, changes, scaling, window, softmax)
