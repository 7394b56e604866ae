"""What the values between stages say of themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from profiles import tiny_profile

from kvcompile.stages import KeptLosses


@pytest.mark.parametrize("kind", ["key", "value"])
def test_losses_of_codecs_follow_the_tokens_that_are_kept(kind: str) -> None:
    profile = tiny_profile()
    whole = getattr(profile, f"{kind}_loss")
    everywhere = profile.codec_loss(kind, np.array([1, 10, profile.window]))
    np.testing.assert_array_equal(everywhere, np.repeat(whole[..., None, :].astype(float), 3, -2))

    tokens = np.array([4, 16], np.int32)
    key, value = (
        np.random.default_rng(0).uniform(0.1, 2, (*table.shape[:3], 2, table.shape[3])).astype(np.float32)
        for table in (profile.key_loss, profile.value_loss)
    )
    known = replace(profile, kept=KeptLosses(tokens, key, value))
    found = known.codec_loss(kind, np.array([2, 4, 8, 16, profile.window, 2 * profile.window]))
    measured = key if kind == "key" else value
    np.testing.assert_allclose(found[..., 0, :], measured[..., 0, :], rtol=1e-6)
    np.testing.assert_allclose(found[..., 1, :], measured[..., 0, :], rtol=1e-6)
    np.testing.assert_allclose(found[..., 2, :], np.sqrt(measured[..., 0, :] * measured[..., 1, :]), rtol=1e-6)
    np.testing.assert_allclose(found[..., 3, :], measured[..., 1, :], rtol=1e-6)
    np.testing.assert_allclose(found[..., 4, :], whole, rtol=1e-6)
    np.testing.assert_allclose(found[..., 5, :], whole, rtol=1e-6)


def test_where_nothing_is_lost_nothing_is_predicted() -> None:
    profile = tiny_profile()
    nothing = [np.zeros((*t.shape[:3], 1, t.shape[3]), np.float32) for t in (profile.key_loss, profile.value_loss)]
    free = replace(profile, key_loss=0 * profile.key_loss, kept=KeptLosses(np.array([8], np.int32), *nothing))
    assert free.codec_loss("key", np.array([5, 20])).max() < 1e-20
