"""What files of other systems say of a model's heads, as plain arrays: L layers, H KV heads, Hq query heads.

`source` names where a value comes from, for messages: the path of a file, or the model it was made for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Importance:
    """`weights` float64 [L, H], or [L, Hq] by query heads, at least 0: tokens are divided in proportion to them. Layers
    with a sliding window may be left out, or have no weight."""

    source: str
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class Gates:
    """`gates` float64 [L, H] or [L, Hq], in [0, 1]: heads with a larger one are rather kept full; the others stream,
    with the `sink` first and `recent` last tokens."""

    source: str
    gates: NDArray[np.float64]
    sink: int
    recent: int


@dataclass(frozen=True)
class Curves:
    """`kept` float64 [N, L, H], in [0, 1]: shares of a head's tokens that are kept, at N levels of compression."""

    source: str
    kept: NDArray[np.float64]


@dataclass(frozen=True)
class Windows:
    """`windows` int64 [L], tokens that every head of a layer keeps, `sink` of them the first ones (None: not said)."""

    source: str
    windows: NDArray[np.int64]
    sink: int | None


Value = Importance | Gates | Curves | Windows
