"""Transforms for codecs that give the components of a vector unequal bits.

A balanced transform is spread(D) B, where the rows of B are independent directions of keys, those that products see
most first, and spread(D) mixes all of them, so that every element is worth as much. A codec with sections wants the
first directions in its first section: in place of spread(D), each section is mixed for itself. Both mixings are
orthogonal, so one transform follows from the other. Giving bits to directions by what they weigh is reverse
water-filling (Cover and Thomas, Elements of Information Theory, 10.3.3).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import Quantiser
from kvcompile.kernels.codecs import codec_of, is_quantised
from kvcompile.kernels.codecs.base import EIGHTHS
from kvcompile.quantiser.balance import Array, spread


def sectioned(bits: int, head_dim: int) -> Array | None:
    """The orthogonal matrix [D, D] that a balanced transform is multiplied with for the codec of this id; None where
    the codec has no sections, or does not fit the size."""
    codec = codec_of(bits)
    return _mixing(codec.sections, head_dim) if codec.sections and codec.fits(head_dim) else None


def laid_out(quantiser: Quantiser, k_bits: NDArray[np.uint8], v_bits: NDArray[np.uint8]) -> Quantiser:
    """A quantiser of balanced transforms for heads that are stored in `k_bits` and `v_bits` [L, H]."""
    return _changed(quantiser, k_bits, v_bits, undo=False)


def balanced_again(quantiser: Quantiser, k_bits: NDArray[np.uint8], v_bits: NDArray[np.uint8]) -> Quantiser:
    """What `laid_out` was given, but for rounding to float16."""
    return _changed(quantiser, k_bits, v_bits, undo=True)


def _changed(quantiser: Quantiser, k_bits: NDArray[np.uint8], v_bits: NDArray[np.uint8], undo: bool) -> Quantiser:
    tables = []
    for transforms, bits in ((quantiser.key_transform, k_bits), (quantiser.value_transform, v_bits)):
        changed = transforms.copy()
        for at in np.ndindex(*bits.shape):
            mixing = sectioned(int(bits[at]), transforms.shape[-1]) if is_quantised(int(bits[at])) else None
            if mixing is not None:
                changed[at] = (mixing.T if undo else mixing) @ transforms[at].astype(np.float64)
        tables.append(changed)
    return Quantiser(tables[0], quantiser.key_mean, tables[1], quantiser.value_mean)


@cache
def _mixing(sections: tuple[tuple[int, int], ...], head_dim: int) -> Array:
    mixed, start = np.eye(head_dim), 0
    for _, eighths in sections:
        stop = start + head_dim * eighths // EIGHTHS
        mixed[start:stop, start:stop] = spread(stop - start)
        start = stop
    together: Array = mixed @ spread(head_dim).T
    return together
