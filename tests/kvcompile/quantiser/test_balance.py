"""The transform of one head."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompile.artifacts import Quantiser
from kvcompile.quantiser import balanced, spread


@pytest.mark.parametrize("size", [8, 16, 64, 72, 80, 96, 128])
def test_spreading_is_orthogonal_and_even(size: int) -> None:
    matrix = spread(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    assert np.abs(matrix).max() <= 2.0 / np.sqrt(size)


def test_balanced_transforms_reach_the_bound() -> None:
    """tr(T C T') tr(T^-T S T^-1) is least, (sum of roots of the eigenvalues of C S)^2."""
    rng = np.random.default_rng(0)
    stored, against = (a @ a.T + 0.5 * np.eye(16) for a in rng.standard_normal((2, 16, 16)))
    transform = balanced(stored, against)
    back = np.linalg.inv(transform)
    cost = np.trace(transform @ stored @ transform.T) * np.trace(back.T @ against @ back)
    least = np.sqrt(np.linalg.eigvals(stored @ against).real).sum() ** 2
    assert cost == pytest.approx(least, rel=1e-2)
    assert cost < np.trace(stored) * np.trace(against)


def test_quantisers_have_every_table() -> None:
    assert set(Quantiser.__dataclass_fields__) == {"key_transform", "key_mean", "value_transform", "value_mean"}
