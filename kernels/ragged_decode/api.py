"""Attention of new tokens over a ragged store: the checked entry point."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcompile.kernels import native
from kvcompile.kernels.buffers import Buffers
from kvcompile.kernels.codecs import codec_of
from kvcompile.kernels.dispatch import takes_kernels
from kvcompile.kernels.layout import LayerLayout
from kvcompile.kernels.ragged_decode import dense
from kvcompile.kernels.ragged_decode.totals import Totals

MOST_ROWS = 1024
"""Queries of a group times new tokens that the GPU kernel takes, eight rows a program; for more of them, products of
larger tiles are faster, and they go through torch."""

LARGEST = 256
"""Elements of a head that the GPU kernel has launch options for (`tuning`); larger ones (Gemma-4) go through torch."""


def ragged_decode(
    query: torch.Tensor,
    keys: Buffers,
    values: Buffers,
    layout: LayerLayout,
    seen: Sequence[int] | torch.Tensor,
    *,
    scaling: float,
    new_keys: torch.Tensor | None = None,
    new_values: torch.Tensor | None = None,
    new_mask: torch.Tensor | None = None,
    new_pad: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    totals: Totals | None = None,
) -> torch.Tensor:
    """Attend to every filled slot and, where given, causally to the new tokens themselves.

    Args:
        query: [B, num_heads, T, D], query heads of one KV head side by side, in storage order.
        keys, values: what the layer stores; RoPE is already applied to keys, so slots have no order. Where heads are
            quantised, queries and new keys and values come transformed, and the output is to be restored (`Transform`).
        layout: the layer's classes; `num_heads` is a multiple of its KV heads.
        seen: tokens stored so far, one number a sequence; a head of capacity C has `min(seen, C)` filled slots.
        scaling: factor on the logits.
        new_keys, new_values: [B, num_kv_heads, N, D], tokens not yet stored, of which the queries are those of the
            last T. Without them the query's own tokens have been stored already, and T must be 1.
        new_mask: bool [B, 1, T, T], True where query t sees new token j, for N = T; a token that does not see itself
            is padding. None: causal, and within the layer's sliding window.
        new_pad: int64 [B] on the device, in place of a mask: the new tokens of sequence b before this one are padding
            (None: no padding). What padding itself sees is left open, but finite.
        places: int32 [B] on the device, which of the store's sequences each of these is (None: the store has these and
            no others, in order). As `seen`, it is read by the kernels when they run, so that a recorded step follows
            it.
        totals: where to say what the exponentials add up to, and how logits are bent before that (None: nowhere, and
            not at all). It is for torch and C.

    Returns:
        [B, num_heads, T, D] in the query's dtype. On a layer with a sliding window, a query sees the stored tokens
        fewer than `window` before it; padding is not counted.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    batch, num_heads, length, head_dim = query.shape
    if num_heads % layout.num_kv_heads:
        raise ValueError(f"{num_heads} query heads are no multiple of the layout's {layout.num_kv_heads} KV heads")
    for stored in (keys, values):
        held = len(stored.exact) if places is None else len(places)
        if (held, stored.head_dim) != (batch, head_dim):
            found = (held, stored.head_dim)
            raise ValueError(f"a store of {found} sequences and elements, expected {(batch, head_dim)}")
    if len(seen) != batch:
        raise ValueError(f"{len(seen)} lengths for a batch of {batch}")
    if new_keys is None and length != 1:
        raise ValueError(f"{length} query tokens without their own keys: only one token can be stored in advance")
    new = length if new_keys is None else new_keys.shape[2]
    if new < length or (new_mask is not None and (new > length or new_pad is not None)):
        raise ValueError(f"{length} queries and {new} new tokens with a mask and padding: expected one of these")
    rows = length * num_heads // layout.num_kv_heads
    # The kernel counts columns, in which padding would shift a sliding window.
    fits = new == length and (not layout.window or (new_mask is None and new_pad is None))
    if totals is None and fits and rows <= MOST_ROWS and takes_steps(query, head_dim, layout):
        from kvcompile.kernels.ragged_decode import triton

        new_mask = new_mask if new_pad is None else _mask(new_pad, length)
        return triton.ragged_decode(query, keys, values, layout, seen, scaling, new_keys, new_values, new_mask, places)
    if new_keys is None and (totals is None or totals.cap is None) and native.usable(query, head_dim, layout):
        return native.one_token(query, keys, values, layout, seen, scaling, places, totals)
    if places is not None:
        keys, values = keys.at(places), values.at(places)
    others = (new_keys, new_values, new_mask, new_pad)
    return dense.ragged_decode(query, keys, values, layout, seen, scaling, *others, totals)


def takes_steps(tensor: torch.Tensor, head_dim: int, layout: LayerLayout) -> bool:
    """Whether steps of a layer on this tensor's device are the GPU kernel's: nothing in them waits for the device."""
    return head_dim <= LARGEST and takes_kernels(tensor, layout) and _whole_words(head_dim, layout)


def _mask(pad: torch.Tensor, length: int) -> torch.Tensor:
    """The mask bool [B, 1, T, T] that `new_pad` stands for; padding sees itself."""
    column = torch.arange(length, device=pad.device)
    real = (column >= pad[:, None, None]) & (column <= column[:, None])
    return (real | (column == column[:, None]))[:, None]


def _whole_words(head_dim: int, layout: LayerLayout) -> bool:
    """Whether the codes of a group fill whole 16 bits, in which the kernel reads them; of 3 bits, the high ones too."""
    groups = [group for id in layout.codecs for group in codec_of(id).split(head_dim)]
    return all(g.size % 16 == 0 if g.bits == 3 else g.size * g.bits % 16 == 0 for g in groups)
