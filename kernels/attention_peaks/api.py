"""The checked entry point."""

from __future__ import annotations

from torch import Tensor

from kvcompile.kernels.attention_peaks import dense
from kvcompile.kernels.native import peaks
from kvcompile.kernels.softmax import PLAIN, Softmax


def attention_peaks(
    query: Tensor,
    keys: Tensor,
    own_keys: Tensor,
    places: Tensor,
    scaling: float,
    window: int = 0,
    softmax: Softmax = PLAIN,
) -> Tensor:
    """The largest probability with which any row, and any query head of a group, attends to each token of a context.

    Args:
        query: [num_heads, T, D], rows of a follow-up, which sees the context and itself causally.
        keys: [H, n, D] of the context, rotary embedding applied.
        own_keys: [H, m, D] of the follow-up.
        places: int64 [T], which of the own tokens each row is; ascending.
        scaling: factor on the logits.
        window: columns that a row sees, its own included; 0 for all of them.
        softmax: how logits become weights.

    Returns:
        float32 [H, n].

    Raises:
        ValueError: shapes that do not fit each other.
    """
    if query.shape[0] % keys.shape[0] or query.shape[1] != len(places) or own_keys.shape[0] != keys.shape[0]:
        raise ValueError(
            f"query {tuple(query.shape)} and own keys {tuple(own_keys.shape)} for {len(places)} places and keys "
            f"{tuple(keys.shape)}: expected a multiple of as many heads, and a row for each place"
        )
    if peaks.usable(query, keys, own_keys, window, softmax):
        return peaks.attention_peaks(query, keys, own_keys, places, scaling)
    return dense.attention_peaks(query, keys, own_keys, places, scaling, window, softmax)
