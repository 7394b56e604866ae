"""What TurboQuant knows of vectors by their size alone: a rotation and a codebook."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import beta, betainc

SETTLED = 1e-12
"""A change of the levels, in standard deviations of a coordinate, below which Lloyd's iteration has ended."""


@cache
def rotation(size: int) -> NDArray[np.float64]:
    """A random orthogonal matrix [D, D], always the same for a size: Hadamard's with random signs of its columns where
    D is a power of two, else Q of a Gaussian matrix, which is uniform over all orthogonal ones."""
    rng = np.random.default_rng(size)
    if size & (size - 1):
        q, r = np.linalg.qr(rng.standard_normal((size, size)))
        uniform: NDArray[np.float64] = q * np.sign(np.diag(r))
        return uniform
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signed: NDArray[np.float64] = matrix * rng.choice([-1.0, 1.0], size) / np.sqrt(size)
    return signed


@cache
def codebook(size: int, bits: int) -> NDArray[np.float64]:
    """The 2^bits levels, ascending and symmetric about 0, with the least squared error for a coordinate x of a random
    unit vector of D elements, whose density is (1 - x^2)^((D - 3) / 2) / B(1/2, (D - 1) / 2) (a Beta distribution).

    Lloyd's iteration (IEEE Trans. Inf. Theory 28, 1982): a level becomes the mean of what is nearest to it. Means are
    exact, from the antiderivatives of the density and of x times it.
    """
    half = (size - 1) / 2

    def below(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(betainc(half, half, (1 + x) / 2))

    def moment(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(-((1 - x**2) ** half) / (2 * half * beta(0.5, half)))

    count, deviation = 1 << bits, size**-0.5
    levels = 2 * deviation * ((2 * np.arange(count) + 1) / count - 1)
    while True:
        edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        better = np.diff(moment(edges)) / np.diff(below(edges))
        done = np.abs(better - levels).max() <= SETTLED * deviation
        levels = better
        if done:
            return (levels - levels[::-1]) / 2
