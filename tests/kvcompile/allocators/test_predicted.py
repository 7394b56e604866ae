"""The profile's losses at other contexts than its own."""

from __future__ import annotations

import numpy as np
import pytest

from kvcompile.allocators.predicted import quantised


@pytest.mark.parametrize("kind", ["key", "value"])
def test_codecs_lose_more_in_longer_contexts(make_problem, kind: str) -> None:
    def loss(context: int) -> np.ndarray:
        # As large a share of either context.
        problem = make_problem(context=context, window=512, bits=(16, 8, 4), sliding=(1,))
        return quantised(problem, kind, np.array([4 + (context - 4) // 4]))

    there, longer, shorter = loss(512), loss(4 + 508 * 16), loss(256)
    assert (there[..., 1:] > 0).all()
    assert (there[..., 0] == 0).all()
    np.testing.assert_allclose(longer[:, 0], there[:, 0] * ((4 + 508 * 16) / 512) ** 0.5)
    np.testing.assert_allclose(shorter[:, 0], there[:, 0])
    # A sliding layer, whose window is an eighth of the context.
    np.testing.assert_allclose(longer[:, 1], there[:, 1] * ((4 + 508 * 16) / 8 / 512) ** 0.5, rtol=2e-3)
