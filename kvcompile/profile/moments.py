"""Moments of what is stored and of what it is multiplied with, for the transform of `kvcompile.quantiser`.

What matters is where attention goes: the error of logit (t, j) moves the output by p (v_j - o_t), so keys and queries
are weighted with p^2 ||W_O (v_j - o_t)||^2, values and outputs with p^2. Keys and queries are taken as they were before
rotary embedding, so that the transform can be made for positions that were not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompile.artifacts import ModelError, Quantiser
from kvcompile.kernels import Rows, error_weights
from kvcompile.profile.attention import Attention
from kvcompile.profile.context import Context, Packed, judged
from kvcompile.profile.rotation import unrotated
from kvcompile.quantiser import TINY, Positions, about, balanced, fit_keys, key_moments, unit_trace
from kvcompile.stages import KeyMoments, Rotary

ROWS = 128
"""Judged rows of a follow-up that are looked at."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens of one layer, float64: for keys and values x with weights w, `*_weight` [H] sums w, `*_first`
    [H, D] w x, `*_second` [H, D, D] w x x'; the `plain_*` ones have w = 1 and count in `tokens` []; `query` [H, D, D]
    is the weighted second moment of queries, `output` [H, D, D] that of the output's effect on the residual stream.
    Keys and queries are those before rotary embedding."""

    tokens: NDArray[np.float64]
    plain_key_first: NDArray[np.float64]
    plain_key_second: NDArray[np.float64]
    plain_value_first: NDArray[np.float64]
    plain_value_second: NDArray[np.float64]
    key_weight: NDArray[np.float64]
    key_first: NDArray[np.float64]
    key_second: NDArray[np.float64]
    value_weight: NDArray[np.float64]
    value_first: NDArray[np.float64]
    value_second: NDArray[np.float64]
    query: NDArray[np.float64]
    output: NDArray[np.float64]


MOMENTS = tuple(f.name for f in fields(Moments))


def moment_shapes(num_kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """The shape of every sum of one layer: what is no count, weight or first moment is a second moment."""
    known = {"tokens": (), "weight": (num_kv_heads,), "first": (num_kv_heads, head_dim)}
    second = (num_kv_heads, head_dim, head_dim)
    return {name: known.get(name.rsplit("_")[-1], second) for name in MOMENTS}


def moments(call: Attention, context: Context, packed: Packed, projection: Tensor, rotary: Rotary) -> Moments:
    """Moments of one context in one layer; `projection` [d, Hq * D] is W_O. Token 0 is left out: it is stored as it
    is."""
    values = context.values[call.layer].float()
    num_kv_heads, length, head_dim = values.shape
    keys = unrotated(context.keys[call.layer], torch.arange(length, device=values.device), rotary, call.layer)
    asked = torch.from_numpy(packed.positions).to(values.device)
    # M = W_O' W_O of every query head, [H, G, D, D]: x'Mx is the squared length of what x adds to the residual stream.
    outward = projection.float().view(len(projection), num_kv_heads, -1, head_dim)
    metric = torch.einsum("dhgi,dhgj->hgij", outward, outward)
    key_weight = keys.new_zeros(num_kv_heads, length)
    value_weight = torch.zeros_like(key_weight)
    query = keys.new_zeros(num_kv_heads, head_dim, head_dim)
    output = torch.zeros_like(query)
    chosen = [judged(block, ROWS).to(values.device) for block in packed.blocks]
    rows = [
        Rows(call.query[:, some], call.key[:, block.start : block.stop], some - block.start)
        for block, some in zip(packed.blocks, chosen, strict=True)
    ]
    stored = context.keys[call.layer], context.values[call.layer]
    weights = error_weights(rows, *stored, metric.flatten(0, 1), call.scaling, call.window or 0, call.softmax)
    for some, one, found in zip(chosen, rows, weights, strict=True):
        count = len(some)  # a mean over rows: follow-ups count alike, however long
        key_weight += found.keys / count
        value_weight += found.values / count
        # Error e of key j is error q_t . e of logits (t, j).
        queries = unrotated(one.query.float() * call.scaling, asked[some], rotary, call.layer)
        grouped = queries.view(num_kv_heads, -1, *queries.shape[1:])
        query += torch.einsum("hgt,hgti,hgtj->hij", found.queries.view(grouped.shape[:3]) / count, grouped, grouped)
        output += torch.einsum("hg,hgij->hij", found.outputs.view(num_kv_heads, -1) / count, metric)
    plain = keys.new_ones(num_kv_heads, length)
    plain[:, 0] = 0

    def sums(weight: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weighted = stored * weight[..., None]
        return weight.sum(1), weighted.sum(1), weighted.mT @ stored

    tokens, plain_key_first, plain_key_second = sums(plain, keys)
    _, plain_value_first, plain_value_second = sums(plain, values)
    arrays = (
        tokens[0], plain_key_first, plain_key_second, plain_value_first, plain_value_second,
        *sums(key_weight, keys), *sums(value_weight, values), query, output,
    )  # fmt: skip
    return Moments(*(array.double().cpu().numpy() for array in arrays))


def require_finite(arrays: Iterable[NDArray[Any]]) -> None:
    """Raises ModelError for NaN and infinity, which float16 weights and activations can lead to."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise ModelError("profiling met numbers that are not finite: load the model in float32 or bfloat16")


def keys_of(layers: Sequence[Moments], rotary: Rotary) -> KeyMoments:
    """The moments of keys and queries of all layers, as an artifact holds them. Raises ModelError for sums that are not
    finite."""

    def stacked(name: str) -> NDArray[np.float64]:
        return np.stack([getattr(m, name) for m in layers])

    require_finite([stacked(name) for name in MOMENTS])

    counts = np.broadcast_to(stacked("tokens")[:, None], stacked("key_weight").shape)
    return key_moments(
        (counts, stacked("plain_key_first"), stacked("plain_key_second")),
        (stacked("key_weight"), stacked("key_first"), stacked("key_second")),
        stacked("query"),
        rotary,
    )


def fit_quantiser(layers: Sequence[Moments], keys: KeyMoments, positions: tuple[Positions, ...]) -> Quantiser:
    """The transforms and means of all heads, those of keys made for `positions`, a range a layer."""
    key_transform, key_mean = fit_keys(keys, positions)
    transforms, means = [], []
    for m in layers:
        # Values that are never attended to have no mean by attention: all tokens' takes its place.
        mean = m.value_first / np.maximum(m.value_weight, TINY)[:, None]
        mean = np.where(m.value_weight[:, None] > 0, mean, m.plain_value_first / m.tokens)
        attended = about(m.value_first, m.value_second, mean, m.value_weight[:, None, None])
        plain = about(m.plain_value_first, m.plain_value_second, mean, float(m.tokens))
        # Half of the covariance is that of all tokens, so that what calibration never attended to is not ruined.
        stored = unit_trace(attended) + unit_trace(plain)
        transforms.append(np.stack([balanced(c, s) for c, s in zip(stored, m.output, strict=True)]))
        means.append(mean)
    return Quantiser(
        key_transform, key_mean, np.stack(transforms).astype(np.float16), np.stack(means).astype(np.float16)
    )
