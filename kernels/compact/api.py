"""Cut a prompt down to the budget: the checked entry point."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels import native
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.compact import dense
from kvcompile.kernels.dispatch import takes_kernels
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.transform import Transform


def compact(
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    tokens: Sequence[torch.Tensor],
    seen: Sequence[int] | torch.Tensor,
    transform: Transform | None = None,
) -> None:
    """Fill the first slots of every head with chosen tokens of the sequences' prompts, quantised on the way where the
    head is: slot s of head h of sequence b gets the token in column `tokens[class][b, h, s]`.

    Args:
        keys, values: what the layer stores.
        layout: the layer's classes.
        new_keys, new_values: [B, num_kv_heads, n, D] of the prompts side by side in n columns, not transformed.
        tokens: int64 [B, count, kept] for every class, kept <= capacity. Where slot 0 is a sink it gets token 0, which
            quantised heads keep as an exact copy too.
        seen: tokens of the prompts, one number a sequence. What `tokens` says of slots from `seen[b]` on has no
            meaning but is a column, and what is then in these slots has none either.
        transform: that of the quantised heads; None if no head needs one.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    held = (len(keys.exact), layout.num_kv_heads)
    if new_keys.shape != new_values.shape or new_keys.shape[:2] != held or len(tokens) != len(layout.classes):
        raise ValueError(
            f"keys {tuple(new_keys.shape)} and values {tuple(new_values.shape)} with tokens for {len(tokens)} classes "
            f"do not fit {held[0]} sequences in a layer of {held[1]} heads in {len(layout.classes)} classes"
        )
    if len(seen) != held[0]:
        raise ValueError(f"{len(seen)} lengths for {held[0]} sequences")
    for cls, token in zip(layout.classes, tokens, strict=True):
        if token.shape[:2] != (held[0], cls.count) or token.shape[2] > cls.capacity:
            raise ValueError(f"tokens {tuple(token.shape)} for {held[0]} x {cls.count} heads of {cls.capacity} slots")
    if takes_kernels(new_keys, layout):
        from kvcompile.kernels.compact import triton

        triton.compact(keys, values, layout, new_keys, new_values, tokens, seen, transform)
        return
    if native.usable(keys.exact, keys.head_dim, layout) and native.cut.takes(new_keys, new_values):
        native.cut.compact(keys, values, layout, new_keys, new_values, tokens, transform)
        return
    dense.compact(keys, values, layout, new_keys, new_values, tokens, seen, transform)
