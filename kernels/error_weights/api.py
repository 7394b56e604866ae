"""The checked entry point."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvcompile.kernels.error_weights import dense
from kvcompile.kernels.error_weights.values import Rows, Weights
from kvcompile.kernels.native import errors
from kvcompile.kernels.softmax import PLAIN, Softmax


def error_weights(
    asked: Sequence[Rows],
    keys: Tensor,
    values: Tensor,
    metric: Tensor,
    scaling: float,
    window: int = 0,
    softmax: Softmax = PLAIN,
) -> list[Weights]:
    """How much errors in each of several follow-ups' attention to a context matter, by the length of what they add to
    the residual stream.

    With P[t, j] the probabilities and o_t their mix of the context's values, an error e of logit (t, j) moves the
    output by P (v_j - o_t) e, and an error of value j by P times it. So keys and queries are weighted with
    P^2 (v_j - o_t)'M(v_j - o_t), values with P^2. Token 0 has no weight: it is stored as it is.

    Args:
        asked: the follow-ups' rows.
        keys, values: [H, n, D] of the context, rotary embedding applied.
        metric: f32 [num_heads, D, D], M = W_O'W_O of every query head.
        scaling: factor on the logits.
        window: columns that a row sees, its own included; 0 for all of them.
        softmax: how logits become weights.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    heads, _, head_dim = keys.shape
    if keys.shape != values.shape or len(metric) % heads or metric.shape[1:] != (head_dim, head_dim):
        raise ValueError(
            f"keys {tuple(keys.shape)}, values {tuple(values.shape)}, metric {tuple(metric.shape)}: expected as many "
            f"keys as values, and [{head_dim}, {head_dim}] of a multiple of their heads"
        )
    for rows in asked:
        if rows.query.shape != (len(metric), len(rows.places), head_dim):
            raise ValueError(
                f"query {tuple(rows.query.shape)}: expected {(len(metric), len(rows.places), head_dim)}, a row for "
                "each place"
            )
    if all(errors.usable(rows.query, keys, rows.own_keys, window, softmax) for rows in asked):
        return errors.error_weights(asked, keys, values, metric, scaling)
    return dense.error_weights(asked, keys, values, metric, scaling, window, softmax)
