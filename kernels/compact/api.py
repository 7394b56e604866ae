"""Cut a prompt down to the budget: the checked entry point."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.compact import dense
from kvcompile.kernels.dispatch import takes_kernels
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.transform import Transform


def compact(
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    sequence: int,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    transform: Transform | None = None,
) -> None:
    """Fill the first slots of every head of one sequence with chosen tokens of its prompt, quantised on the way where
    the head is: slot s of head h gets token `tokens[class][h, s]`.

    Args:
        keys, values: what the layer stores.
        layout: the layer's classes.
        sequence: its place in the batch.
        new_keys, new_values: [num_kv_heads, n, D] of the prompt, not transformed.
        tokens: int64 [count, kept] for every class, kept <= capacity. Where slot 0 is a sink it gets token 0, which
            quantised heads keep as an exact copy too.
        transform: that of the quantised heads; None if no head needs one.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if new_keys.shape != new_values.shape or len(new_keys) != layout.num_kv_heads or len(tokens) != len(layout.classes):
        raise ValueError(
            f"keys {tuple(new_keys.shape)} and values {tuple(new_values.shape)} with tokens for {len(tokens)} classes "
            f"do not fit a layer of {layout.num_kv_heads} heads in {len(layout.classes)} classes"
        )
    for cls, token in zip(layout.classes, tokens, strict=True):
        if len(token) != cls.count or token.shape[1] > cls.capacity:
            raise ValueError(f"tokens {tuple(token.shape)} for {cls.count} heads of {cls.capacity} slots")
    if takes_kernels(new_keys, layout):
        from kvcompile.kernels.compact import triton

        triton.compact(keys, values, layout, sequence, new_keys, new_values, tokens, transform)
        return
    dense.compact(keys, values, layout, sequence, new_keys, new_values, tokens, transform)
