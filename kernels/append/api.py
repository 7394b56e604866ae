"""Store the token of a decode step: the checked entry point."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels import native
from kvcompile.kernels.append import dense
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.dispatch import takes_kernels
from kvcompile.kernels.layout import LayerLayout


def append(
    keys: Buffers,
    values: Buffers,
    scores: torch.Tensor,
    layout: LayerLayout,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    score: torch.Tensor | None,
    seen: Sequence[int] | torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """Write one new token a sequence in place, quantised where the head is; nothing is allocated, nothing else
    moves.

    A head that is not full takes the next free slot. A full one takes the slot of the oldest token of its ring. Before
    that, a head of policy `scored` moves this oldest token to the slot of the worst of the tokens between sinks and
    ring, should it score above it (of several worst ones, the last). Heads of policies that place tokens
    themselves (`OTHER`) are left as they are.

    Args:
        keys, values: what the layer stores.
        scores: float16 [B, scored slots], those of heads of policy `scored`, in storage order.
        layout: the layer's classes.
        new_keys, new_values: [B, num_kv_heads, D], transformed where heads are quantised.
        score: f32 [B, num_kv_heads] of the new token by the compiled scorer; None where no head is `scored`.
        seen: tokens stored before this one, one number a sequence.
        places: see `ragged_decode`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    held = len(keys.exact)
    shape = (held if places is None else len(places), layout.num_kv_heads, keys.head_dim)
    if new_keys.shape != shape or new_values.shape != shape or len(seen) != shape[0]:
        raise ValueError(
            f"keys {tuple(new_keys.shape)}, values {tuple(new_values.shape)} and {len(seen)} lengths for a store of "
            f"{shape}"
        )
    if scores.shape != (held, layout.scored_slots) or (layout.scored_slots and score is None):
        raise ValueError(f"scores {tuple(scores.shape)}, expected {(held, layout.scored_slots)} and the new ones")
    if takes_kernels(new_keys, layout):
        from kvcompile.kernels.append import triton

        triton.append(keys, values, scores, layout, new_keys, new_values, score, seen, places)
        return
    if native.usable(keys.exact, keys.head_dim, layout):
        native.append(keys, values, scores, layout, new_keys, new_values, score, seen, places)
        return
    if places is None:
        dense.append(keys, values, scores, layout, new_keys, new_values, score, seen)
        return
    # In copies of these sequences, which are then put back.
    k, v, held_scores = keys.at(places), values.at(places), scores.index_select(0, places)
    dense.append(k, v, held_scores, layout, new_keys, new_values, score, seen)
    keys.put(places, k)
    values.put(places, v)
    scores.index_copy_(0, places.long(), held_scores)
