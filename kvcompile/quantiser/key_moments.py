"""Moments of keys and queries before rotary embedding, as an artifact holds them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvcompile.quantiser.balance import TINY, unit_trace
from kvcompile.stages import KeyMoments, Moment, Rotary

Array = NDArray[np.float64]

LARGEST = float(np.finfo(np.float16).max)
"""Larger entries are stored as this: infinity would spoil the whole matrix."""


def stored_moments(mean: Array, second: Array) -> Moment:
    """A moment from means [L, H, D] and second moments about 0, [L, H, D, D]."""
    centred = second - mean[..., :, None] * mean[..., None, :]
    values, vectors = np.linalg.eigh((centred + centred.swapaxes(-1, -2)) / 2)
    # C = V diag(w) V', so root = V diag(w)^1/2 is one of its roots; rounding may leave a w below 0.
    root = vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
    # root root' = A A' for the triangle A of its LQ decomposition; signs are chosen, so that A is unique.
    lower = np.linalg.qr(root.swapaxes(-1, -2))[1].swapaxes(-1, -2)
    sign = np.where(np.diagonal(lower, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return Moment(mean.astype(np.float32), packed(lower * sign[..., None, :]))


def key_moments(
    plain: tuple[Array, Array, Array], attended: tuple[Array, Array, Array], query: Array, rotary: Rotary
) -> KeyMoments:
    """From sums: of weights [L, H], first [L, H, D] and second moments [L, H, D, D], over all tokens and over tokens by
    the attention they get; and of second moments of queries, whose scale does not matter. A head whose keys were never
    attended to takes the plain ones."""
    means = [
        (first / np.maximum(weight, TINY)[..., None], second / np.maximum(weight, TINY)[..., None, None])
        for weight, first, second in (plain, attended)
    ]
    seen = attended[0] > 0
    mean = np.where(seen[..., None], means[1][0], means[0][0])
    second = np.where(seen[..., None, None], means[1][1], means[0][1])
    about_zero = np.zeros_like(mean)  # queries multiply keys as they are, mean and all
    return KeyMoments(
        plain=stored_moments(*means[0]),
        attended=stored_moments(mean, second),
        query=stored_moments(about_zero, unit_trace(query)),
        rotary=rotary,
    )


def packed(lower: Array) -> NDArray[np.float16]:
    """The rows of lower triangles [..., D, D] up to the diagonal, one after another."""
    rows, columns = np.tril_indices(lower.shape[-1])
    return np.clip(lower[..., rows, columns], -LARGEST, LARGEST).astype(np.float16)
