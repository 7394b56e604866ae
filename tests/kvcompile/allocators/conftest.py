"""Random problems whose curves look like measured ones: falling, noisy, not always monotone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvcompile.stages import KeptLosses, Problem, Profile


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
    families: int = 1,
    bits: tuple[int, ...] = (16,),
    classes: int | None = None,
) -> Problem:
    """With several `families` or `bits`, curves of `scored` too, lower than those of `recent` for most heads."""
    rng = np.random.default_rng(seed)
    tokens = np.unique(np.rint(np.geomspace(sink + 1, window, points)).astype(np.int32))
    height, fall = rng.lognormal(0, 2, (layers, heads, 1)), rng.uniform(0.3, 2, (layers, heads, 1))
    curve = height * ((tokens / 5.0) ** -fall - (window / 5.0) ** -fall)
    loss = 1e-3 * curve * np.exp(0.15 * rng.standard_normal(curve.shape))
    loss[..., -1] = 0
    rich = families > 1 or len(bits) > 1
    shares = np.array([1, 0.5, 0.125] if rich else [1], np.float32)
    better = np.concatenate(
        [np.ones((families, layers, heads, 1)), rng.lognormal(-0.7, 0.7, (families, layers, heads, len(shares) - 1))],
        -1,
    )
    by_family = rng.lognormal(0, 0.5, (families, layers, heads, 1, 1)) if families > 1 else 1.0
    quantised = np.array([1e-3, 1e-1]) * rng.lognormal(0, 1.5, (2, families, layers, heads, 1)) * height * 1e-3
    losses = [
        table.reshape(families, layers, heads, 2).astype(np.float32) for table in (quantised[0], 0.2 * quantised[1])
    ]
    of_kept = rng.lognormal(0, 0.7, (2, families, layers, heads, 2, 2)).astype(np.float32)
    kept = KeptLosses(
        np.array([window // 16, window // 4], np.int32),
        *(f * table[..., None, :] for f, table in zip(of_kept, losses, strict=True)),
    )
    profile = Profile(
        families=tuple(f"family {i}" for i in range(families)),
        window=window,
        tokens=tokens,
        shares=shares,
        loss=(loss[None, :, :, None] * better[..., None] * by_family).astype(np.float32),
        key_bits=np.array([8, 4], np.int32),
        value_bits=np.array([8, 4], np.int32),
        key_loss=losses[0],
        value_loss=losses[1],
        kept=kept if rich else None,
        factor=1.0,
        correlation=float("nan"),
        baklava=rng.random((layers, heads)).astype(np.float32),
        squeeze=rng.random(layers).astype(np.float32),
        surfacelogic=rng.random((layers, heads)).astype(np.float32),
    )
    limit = np.full(layers, context, np.int32)
    limit[list(sliding)] = max(1, context // 8)
    return Problem(
        profile=profile,
        limit=limit,
        fixed=limit < context,
        num_kv_heads=heads,
        head_dim=64,
        dtype_bits=16,
        key_bits=bits,
        value_bits=bits,
        target=int(share * 256 * heads * int(limit.sum())),
        context=context,
        policy=policy,
        sink=sink,
        classes=classes,
        perplexity=perplexity,
    )
