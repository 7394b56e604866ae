"""The checked entry point."""

from __future__ import annotations

from torch import Tensor

from kvcompile.kernels.error_weights import dense
from kvcompile.kernels.error_weights.values import Weights
from kvcompile.kernels.native import errors
from kvcompile.kernels.softmax import PLAIN, Softmax


def error_weights(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    places: Tensor,
    metric: Tensor,
    scaling: float,
    window: int = 0,
    softmax: Softmax = PLAIN,
) -> Weights:
    """How much errors in attention to a context matter, by the length of what they add to the residual stream.

    With P[t, j] the probabilities and o_t their mix of the context's values, an error e of logit (t, j) moves the
    output by P (v_j - o_t) e, and an error of value j by P times it. So keys and queries are weighted with
    P^2 (v_j - o_t)'M(v_j - o_t), values with P^2. Token 0 has no weight: it is stored as it is.

    Args:
        query: [num_heads, T, D], rows of a follow-up, which sees the context and itself causally.
        keys, values: [H, n, D] of the context, rotary embedding applied.
        own_keys: [H, m, D] of the follow-up.
        places: int64 [T], which of the own tokens each row is; ascending.
        metric: f32 [num_heads, D, D], M = W_O'W_O of every query head.
        scaling: factor on the logits.
        window: columns that a row sees, its own included; 0 for all of them.
        softmax: how logits become weights.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    heads, _, head_dim = keys.shape
    if keys.shape != values.shape or query.shape[0] % heads or query.shape[1] != len(places):
        raise ValueError(
            f"query {tuple(query.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}, {len(places)} rows: "
            "expected as many keys as values, a multiple of their heads, and a row for each place"
        )
    if metric.shape != (len(query), head_dim, head_dim):
        raise ValueError(f"metric {tuple(metric.shape)}, expected {(len(query), head_dim, head_dim)}")
    if errors.usable(query, keys, own_keys, window, softmax):
        return errors.error_weights(query, keys, values, own_keys, places, metric, scaling)
    return dense.error_weights(query, keys, values, own_keys, places, metric, scaling, window, softmax)
