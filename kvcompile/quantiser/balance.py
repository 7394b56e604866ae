"""The transform in which quantising a head's keys, or values, costs least.

Let y = T x be quantised with steps proportional to the size of y, after an orthogonal matrix has spread that size
evenly over the components. With C the covariance of what is stored and S that of what it is multiplied with (queries
for keys), the error of a product is proportional to tr(T C T') tr(T^-T S T^-1): the size of y, times what a product
sees of an even error in y. By Cauchy and Schwarz that is at least tr((C^1/2 S C^1/2)^1/2)^2, which is reached by
T'T = C^-1 # S, the geometric mean of the two matrices.

With C^1/2 S C^1/2 = U diag(w) U', largest w first, B = diag(w)^1/4 U' C^-1/2 is one such T: in its directions both the
covariance of what is stored and that of what it meets are diag(w)^1/2. A Hadamard matrix does the spreading, T = H B.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]

TINY = 1e-30
"""Divides in place of 0, where there is nothing to divide."""

FLOOR = 1e-3
"""Least eigenvalue, as a share of the largest, before roots are taken: directions that calibration hardly saw are not
scaled up without bound, and T's condition number is at most the root of 1 / FLOOR, which float16 can hold."""


def balanced(stored: Array, against: Array) -> Array:
    """T [D, D] with T'T proportional to `stored`^-1 # `against`, rotated to spread evenly; its largest singular value
    is 1."""
    size = len(stored)
    if not (np.trace(stored) > 0 and np.trace(against) > 0):
        return spread(size)
    root = _power(stored, 0.5)
    weight, directions = _eigen(root @ against @ root)
    directions = directions[:, ::-1] * np.maximum(weight[::-1], FLOOR * weight[-1]) ** 0.25
    transform: Array = spread(size) @ directions.T @ _power(stored, -0.5)
    return transform / np.linalg.norm(transform, 2)


def quantisation_error(transform: Array, stored: Array, against: Array) -> float:
    """tr(T C T') tr(T^-T S T^-1), to which the expected squared error of a product is proportional."""
    inverse = np.linalg.inv(transform)
    size = np.einsum("ij,jk,ik->", transform, stored, transform)
    return float(size * np.einsum("ji,jk,ki->", inverse, against, inverse))


def about(first: Array, second: Array, mean: Array, weight: Array | float = 1.0) -> Array:
    """Second moments [H, D, D] about `mean` [H, D] from those about 0: `second`, sums of w x x', with `first` [H, D],
    sums of w x, and `weight` [H, 1, 1], sums of w."""
    # sum w (x - m)(x - m)' = sum w x x' - (sum w x) m' - m (sum w x)' + (sum w) m m'
    cross = first[:, :, None] * mean[:, None]
    moved: Array = second - cross - cross.swapaxes(1, 2) + weight * mean[:, :, None] * mean[:, None]
    return moved


def unit_trace(second: Array) -> Array:
    """Second moments [..., D, D] scaled to trace 1, so that two kinds of tokens count alike in their sum."""
    unit: Array = second / np.maximum(np.trace(second, axis1=-2, axis2=-1), TINY)[..., None, None]
    return unit


def spread(size: int) -> Array:
    """An orthogonal matrix whose entries are as equal as can be: Hadamard where `size` is a power of two, else blocks
    of its largest power of two, mixed by a cosine transform."""
    power = size & -size
    hadamard = scipy.linalg.hadamard(power) / np.sqrt(power)
    cosine = scipy.fft.dct(np.eye(size // power), axis=0, norm="ortho")
    return np.kron(cosine, hadamard)


def _power(matrix: Array, exponent: float) -> Array:
    """A power of a symmetric positive matrix, by its eigenvalues."""
    values, vectors = _eigen(matrix)
    power: Array = (vectors * np.maximum(values, FLOOR * values[-1]) ** exponent) @ vectors.T
    return power


def _eigen(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues in ascending order and eigenvectors of a symmetric matrix; the largest entry of a vector is positive,
    so that no library's sign decides what is written to a file."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], axis=0)
    return values, vectors * np.where(largest < 0, -1.0, 1.0)
