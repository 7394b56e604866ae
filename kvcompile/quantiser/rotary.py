"""Rotary embedding as one equation for every layout, and its averages over positions in closed form.

At position p, component d of a key (or query) x becomes

    (R(p) x)[d] = cos(p f[d]) x[d] - sin(p f[d]) x[e],        e = partner[d],  f[e] = -f[d].

f = 0 leaves a component as it is, so partial rotary embedding and none at all are cases of it. (RoFormer,
arXiv 2104.09864, equation 34; the frequencies are the model's own, scaled or not.)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mean_first(first: Array, frequency: Array, partner: NDArray[np.int32], start: int, stop: int) -> Array:
    """E[R(p) x] from x = `first` [..., D], p uniform in [start, stop)."""
    cosine, sine = mean_waves(frequency, start, stop)
    mean: Array = cosine * first - sine * first[..., partner]
    return mean


def mean_second(second: Array, frequency: Array, partner: NDArray[np.int32], start: int, stop: int) -> Array:
    """E[R(p) M R(p)'] from M = `second` [..., D, D], p uniform in [start, stop).

    Entry (d, e) is the mean of (c_d x_d - s_d x_d')(c_e x_e - s_e x_e'); products of waves are waves of the sums and
    differences of their frequencies.
    """
    cos_minus, sin_minus = mean_waves(frequency[:, None] - frequency, start, stop)
    cos_plus, sin_plus = mean_waves(frequency[:, None] + frequency, start, stop)
    # With + and - for the waves of f_d + f_e and f_d - f_e: c_d c_e = (cos- + cos+) / 2, s_d c_e = (sin+ + sin-) / 2,
    # c_d s_e = (sin+ - sin-) / 2, s_d s_e = (cos- - cos+) / 2.
    rows, columns = second[..., partner, :], second[..., partner]
    mean: Array = (
        (cos_minus + cos_plus) * second
        - (sin_plus + sin_minus) * rows
        - (sin_plus - sin_minus) * columns
        + (cos_minus - cos_plus) * rows[..., partner]
    ) / 2
    return mean


def mean_waves(frequency: Array, start: int, stop: int) -> tuple[Array, Array]:
    """Means of cos(p f) and sin(p f) over p in [start, stop): a geometric series, the Dirichlet kernel."""
    # Positions are whole numbers, so f and f + 2 pi are the same rotation; f = 0 is then the only singular case.
    # sum_p exp(i p f) = exp(i f (start + stop - 1) / 2) sin(count f / 2) / sin(f / 2)
    count, half = stop - start, (np.remainder(np.asarray(frequency, np.float64) + np.pi, 2 * np.pi) - np.pi) / 2
    base = np.sin(half)
    whole = np.abs(base) < 1e-12  # every term is 1
    size = np.where(whole, 1.0, np.sin(count * half) / (count * np.where(whole, 1.0, base)))
    phase = (start + stop - 1) * half
    return size * np.cos(phase), size * np.sin(phase)
