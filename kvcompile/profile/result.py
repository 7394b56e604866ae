"""From finished sums to the profile that an artifact holds."""

from __future__ import annotations

import numpy as np

from kvcompile.kernels.codecs import profiled
from kvcompile.profile.eviction import SHARES
from kvcompile.profile.fitted import STORED, points, with_fitted
from kvcompile.profile.resume import Sums
from kvcompile.profile.retrieval import infsc, scaled
from kvcompile.profile.scores import baklava
from kvcompile.profile.setting import Setting
from kvcompile.profile.structure import heads
from kvcompile.stages import KeptLosses, Profile


def profile_of(sums: Sums, setting: Setting) -> Profile:
    """Losses and importance scores; not yet compared with whole plans, and without moments of keys."""
    _, num_kv_heads = heads(setting.model)
    episodes = len(setting.material.fit)
    residual, value = sums["residual_cosine"] / episodes, sums["value_cosine"] / episodes
    shares = np.array(SHARES, np.float32)
    each = np.maximum(sums["weight"], 1).reshape(-1, 1, 1, 1)
    return Profile(
        families=setting.families,
        window=setting.window,
        tokens=setting.budgets,
        shares=shares,
        loss=(with_fitted(sums["loss"], sums["fitted_loss"], setting.budgets, shares < 1) / each[..., None]).astype(
            np.float32
        ),
        key_bits=np.array(profiled("k"), np.int32),
        value_bits=np.array(profiled("v"), np.int32),
        key_loss=(sums["key_loss"] / each).astype(np.float32),
        value_loss=(sums["value_loss"] / each).astype(np.float32),
        kept=KeptLosses(
            setting.budgets[points(setting.budgets)[:STORED]],
            *((sums[f"kept_{kind}_loss"] / each[..., None]).astype(np.float32) for kind in ("key", "value")),
        ),
        factor=1.0,
        correlation=float("nan"),
        baklava=baklava(value, residual, num_kv_heads).astype(np.float32),
        squeeze=residual.astype(np.float32),
        # Sums serve as well as means: the scores are stretched to [0, 1].
        surfacelogic=scaled(infsc(sums)).astype(np.float32),
    )
