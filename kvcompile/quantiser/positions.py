"""Transforms of keys for the positions at which a plan stores them.

Rotary embedding rotates a key by its position, so the mean and covariance of stored keys depend on which positions they
have. Over 2,048 tokens the slow components hardly rotate; over 32,768 they do. From moments before the rotation those
after it follow for any range of positions, as averages over it: E[R(p) M R(p)'].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import Quantiser
from kvcompile.quantiser.balance import about, balanced, quantisation_error, unit_trace
from kvcompile.quantiser.rotary import mean_first, mean_second
from kvcompile.stages import KeyMoments, Moment

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Positions:
    """The tokens of a sequence from `start` to `stop`, itself not included."""

    start: int
    stop: int


def layer_positions(limits: Sequence[int], context: int) -> tuple[Positions, ...]:
    """Where each layer's stored keys are when `context` tokens have been read: everywhere, or in the sliding window
    before the token at hand. `limits` are `kvcompile.artifacts.token_limits`."""
    return tuple(Positions(context - limit, context) for limit in limits)


@lru_cache(maxsize=4)  # several targets from one profile: a second for a 7B model's heads
def fit_keys(moments: KeyMoments, positions: tuple[Positions, ...]) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Transforms f16 [L, H, D, D] and means f16 [L, H, D] of keys at each layer's positions.

    Half of the covariance is that of all tokens, so that what calibration never attended to is not ruined.
    """
    transforms, means = [], []
    for layer, where in enumerate(positions):
        mean, attended, query = _attended(moments, layer, where)
        plain = _about(moments, moments.plain, layer, where, mean)
        stored = unit_trace(attended) + unit_trace(plain)
        transforms.append(np.stack([balanced(c, s) for c, s in zip(stored, query, strict=True)]))
        means.append(mean)
    return np.stack(transforms).astype(np.float16), np.stack(means).astype(np.float16)


@lru_cache(maxsize=4)
def key_growth(moments: KeyMoments, measured: tuple[Positions, ...], wanted: tuple[Positions, ...]) -> Array:
    """By how much the loss of quantised keys grows, [L, H], from the positions where it was measured to others, each
    with the transform made for it: the ratio of expected squared errors of the logits."""
    errors = []
    for positions in (measured, wanted):
        transforms, _ = fit_keys(moments, positions)
        table = []
        for layer, where in enumerate(positions):
            _, attended, query = _attended(moments, layer, where)
            heads = zip(transforms[layer].astype(np.float64), attended, query, strict=True)
            table.append([quantisation_error(*head) for head in heads])
        errors.append(np.array(table))
    before, after = errors
    # A head whose keys or queries are all the same has no error, and none to grow.
    growth: Array = np.divide(after, before, out=np.ones_like(after), where=(before > 0) & (after > 0))
    return growth


def for_context(quantiser: Quantiser, moments: KeyMoments, limits: Sequence[int], context: int) -> Quantiser:
    """A quantiser whose keys are transformed for the positions of `context` tokens; values have none."""
    transform, mean = fit_keys(moments, layer_positions(limits, context))
    return replace(quantiser, key_transform=transform, key_mean=mean)


def _attended(moments: KeyMoments, layer: int, where: Positions) -> tuple[Array, Array, Array]:
    """Mean [H, D], covariance about it [H, D, D] of attended keys, and second moment of queries, at the positions."""
    frequency, partner = moments.rotary.frequency[layer].astype(np.float64), moments.rotary.partner
    mean = mean_first(moments.attended.mean[layer].astype(np.float64), frequency, partner, where.start, where.stop)
    query = mean_second(moments.query.second(layer), frequency, partner, where.start, where.stop)
    return mean, _about(moments, moments.attended, layer, where, mean), query


def _about(moments: KeyMoments, moment: Moment, layer: int, where: Positions, mean: Array) -> Array:
    """Second moments about `mean` [H, D] at the positions, [H, D, D]."""
    frequency, partner = moments.rotary.frequency[layer].astype(np.float64), moments.rotary.partner
    first = mean_first(moment.mean[layer].astype(np.float64), frequency, partner, where.start, where.stop)
    second = mean_second(moment.second(layer), frequency, partner, where.start, where.stop)
    return about(first, second, mean)
