"""Random problems whose curves look like measured ones: falling, noisy, not always monotone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvcompile.problem import Problem, Profile


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    return _make_problem


def _make_problem(
    layers: int = 4,
    heads: int = 2,
    points: int = 12,
    *,
    share: float = 0.25,
    context: int = 512,
    window: int = 512,
    policy: str = "recent",
    sink: int = 4,
    sliding: tuple[int, ...] = (),
    seed: int = 0,
    perplexity=None,
) -> Problem:
    rng = np.random.default_rng(seed)
    tokens = np.unique(np.rint(np.geomspace(sink + 1, window, points)).astype(np.int32))
    height, fall = rng.lognormal(0, 2, (layers, heads, 1)), rng.uniform(0.3, 2, (layers, heads, 1))
    curve = height * ((tokens / 5.0) ** -fall - (window / 5.0) ** -fall)
    loss = 1e-3 * curve * np.exp(0.15 * rng.standard_normal(curve.shape))
    loss[..., -1] = 0
    profile = Profile(
        window=window,
        tokens=tokens,
        recent_loss=loss.astype(np.float32),
        baklava=rng.random((layers, heads)).astype(np.float32),
        squeeze=rng.random(layers).astype(np.float32),
        surfacelogic=rng.random((layers, heads)).astype(np.float32),
    )
    limit = np.full(layers, context, np.int32)
    limit[list(sliding)] = max(1, context // 8)
    slot = {"full": 256, "recent": 256, "h2o": 264, "snapkv": 256}
    return Problem(
        profile=profile,
        limit=limit,
        fixed=limit < context,
        num_kv_heads=heads,
        slot_bytes=slot,
        target=int(share * 256 * heads * int(limit.sum())),
        context=context,
        policy=policy,
        sink=sink,
        perplexity=perplexity,
    )
