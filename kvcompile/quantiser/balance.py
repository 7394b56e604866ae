"""The transform in which quantising a head's keys, or values, costs least.

Let y = T x be rounded with steps proportional to the size of y, after a rotation that spreads that size evenly over the
coordinates. With C the covariance of what is stored and S that of what it is multiplied with (queries for keys), the
error is proportional to tr(T C T') tr(T^-T S T^-1), whose least value (Cauchy and Schwarz) is reached by
T'T = C^-1 # S, the geometric mean of the two matrices; a Hadamard matrix does the spreading.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.linalg
from numpy.typing import NDArray

FLOOR = 1e-3
"""Least eigenvalue, as a share of the largest, before roots are taken."""


def balanced(stored: NDArray[np.float64], against: NDArray[np.float64]) -> NDArray[np.float64]:
    """T [D, D] with T'T proportional to `stored`^-1 # `against`, rotated to spread evenly; its largest singular value
    is 1."""
    size = len(stored)
    if not (np.trace(stored) > 0 and np.trace(against) > 0):
        return spread(size)
    root, inverse = _power(stored, 0.5), _power(stored, -0.5)
    middle = _power(root @ against @ root, 0.5)
    transform: NDArray[np.float64] = spread(size) @ _power(inverse @ middle @ inverse, 0.5)
    return transform / np.linalg.norm(transform, 2)


def quantisation_error(
    transform: NDArray[np.float64], stored: NDArray[np.float64], against: NDArray[np.float64]
) -> float:
    """tr(T C T') tr(T^-T S T^-1), to which the expected squared error of a product is proportional."""
    inverse = np.linalg.inv(transform)
    size = np.einsum("ij,jk,ik->", transform, stored, transform)
    return float(size * np.einsum("ji,jk,ki->", inverse, against, inverse))


def spread(size: int) -> NDArray[np.float64]:
    """An orthogonal matrix whose entries are as equal as can be: Hadamard where `size` is a power of two, else blocks
    of its largest power of two, mixed by a cosine transform."""
    power = size & -size
    hadamard = scipy.linalg.hadamard(power) / np.sqrt(power)
    cosine = scipy.fft.dct(np.eye(size // power), axis=0, norm="ortho")
    return np.kron(cosine, hadamard)


def _power(matrix: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    values = np.maximum(values, FLOOR * values[-1])
    power: NDArray[np.float64] = (vectors * values**exponent) @ vectors.T
    return power
