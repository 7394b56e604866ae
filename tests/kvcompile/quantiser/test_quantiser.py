"""Averages over positions against the sums they stand for, moments as they are stored, and transforms for positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.quantiser import Positions, fit_keys, key_growth, key_moments, layer_positions
from kvcompile.quantiser.key_moments import stored_moments
from kvcompile.quantiser.rotary import mean_first, mean_second, mean_waves
from kvcompile.stages import KeyMoments, Rotary

D = 32


def rotation(position: int, frequency: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """R(p) as a matrix."""
    matrix = np.diag(np.cos(position * frequency))
    matrix[np.arange(D), partner] -= np.sin(position * frequency)
    return matrix


def layout(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Signed frequencies and partners: opposite components, neighbouring ones, half of them, none."""
    half = np.arange(D // 2)
    pairs = {
        "opposite": zip(half, half + D // 2, strict=True),
        "neighbouring": zip(2 * half, 2 * half + 1, strict=True),
        "partial": zip(half[:5], half[:5] + 5, strict=True),
        "none": [],
    }[kind]
    frequency, partner = np.zeros(D), np.arange(D, dtype=np.int32)
    for number, (first, second) in enumerate(pairs):
        frequency[first], frequency[second] = 0.5**number, -(0.5**number)
        partner[first], partner[second] = second, first
    return frequency, partner


@pytest.mark.parametrize("kind", ["opposite", "neighbouring", "partial", "none"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 37), (20, 57), (1000, 1500)])
def test_averages_are_those_of_the_rotations(kind: str, start: int, stop: int) -> None:
    frequency, partner = layout(kind)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, D)) + 2
    every = [rotation(p, frequency, partner) for p in range(start, stop)]
    assert np.allclose(mean_first(x[0], frequency, partner, start, stop), np.mean([r @ x[0] for r in every], 0))
    second = x.T @ x
    direct = np.mean([r @ second @ r.T for r in every], 0)
    assert np.allclose(mean_second(second, frequency, partner, start, stop), direct)


@given(st.floats(-7, 7, allow_nan=False), st.integers(0, 5000), st.integers(1, 300))
def test_waves_are_averaged_in_closed_form(frequency: float, start: int, count: int) -> None:
    p = np.arange(start, start + count)
    cosine, sine = mean_waves(np.array(frequency), start, start + count)
    assert cosine == pytest.approx(np.cos(p * frequency).mean(), abs=1e-6)
    assert sine == pytest.approx(np.sin(p * frequency).mean(), abs=1e-6)


@pytest.mark.parametrize("angle", [0.0, 2 * np.pi, -2 * np.pi, 4 * np.pi])
def test_whole_revolutions_a_token_are_no_rotation(angle: float) -> None:
    cosine, sine = mean_waves(np.array(angle), 3, 10)
    assert cosine == pytest.approx(1)
    assert sine == pytest.approx(0, abs=1e-9)


def test_stored_moments_keep_the_small_eigenvalues() -> None:
    """A covariance whose eigenvalues span a factor of 1000, the floor of the transform: half precision of the matrix
    itself would be off by half of the least."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    covariance = (basis * np.geomspace(1, 1e-3, 64)) @ basis.T
    mean = 30 * rng.standard_normal(64)
    stored = stored_moments(mean[None, None], (covariance + np.outer(mean, mean))[None, None])
    centred = stored.second(0)[0] - np.outer(stored.mean[0, 0], stored.mean[0, 0]).astype(np.float64)
    found = np.linalg.eigvalsh(centred)
    assert np.allclose(found, np.linalg.eigvalsh(covariance), rtol=0.1, atol=0)
    assert np.allclose(centred, covariance, atol=2e-3)


def moments_of(keys: np.ndarray, queries: np.ndarray, kind: str = "opposite") -> KeyMoments:
    frequency, partner = layout(kind)
    weight = np.full((1, 1), float(len(keys)))
    sums = weight, keys.sum(0)[None, None], (keys.T @ keys)[None, None]
    rotary = Rotary(frequency[None].astype(np.float32), partner)
    return key_moments(sums, sums, (queries.T @ queries)[None, None], rotary)


@pytest.fixture
def moments() -> KeyMoments:
    """Keys with a large mean, as models with key biases have."""
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.2, 5, D)
    return moments_of(
        20 * rng.standard_normal(D) + rng.standard_normal((500, D)), rng.standard_normal((500, D)) / scale
    )


def quantised_error(moments: KeyMoments, transform: np.ndarray, mean: np.ndarray, positions: Positions) -> float:
    """Mean squared error of q . k, keys quantised to 4 bits at these positions."""
    rng = np.random.default_rng(3)
    frequency, partner = moments.rotary.frequency[0].astype(np.float64), moments.rotary.partner
    lower = np.linalg.cholesky(moments.plain.second(0)[0] - np.outer(*[moments.plain.mean[0, 0].astype(float)] * 2))
    query = np.linalg.cholesky(moments.query.second(0)[0] + 1e-9 * np.eye(D))
    total = 0.0
    for p in rng.integers(positions.start, positions.stop, 400):
        rotary = rotation(p, frequency, partner)
        key = rotary @ (moments.plain.mean[0, 0] + lower @ rng.standard_normal(D))
        y = transform @ (key - mean)
        scale = abs(y).max() / 8
        back = (np.clip(np.floor(y / scale), -8, 7) + 0.5) * scale
        wrong = np.linalg.solve(transform, back - y)
        total += float((rotary @ query @ rng.standard_normal(D) @ wrong) ** 2)
    return total / 400


def test_a_transform_made_for_the_positions_loses_less(moments: KeyMoments) -> None:
    near, far = Positions(0, 64), Positions(0, 4096)
    made = {where: [table[0, 0].astype(np.float64) for table in fit_keys(moments, (where,))] for where in (near, far)}
    assert quantised_error(moments, *made[far], far) < quantised_error(moments, *made[near], far) / 2
    assert quantised_error(moments, *made[near], near) < quantised_error(moments, *made[far], near) / 2


def test_growth_is_that_of_the_error(moments: KeyMoments) -> None:
    near, far = Positions(0, 64), Positions(0, 4096)
    made = {where: [table[0, 0].astype(np.float64) for table in fit_keys(moments, (where,))] for where in (near, far)}
    measured = quantised_error(moments, *made[far], far) / quantised_error(moments, *made[near], near)
    assert measured / 2 < key_growth(moments, (near,), (far,))[0, 0] < 2 * measured
    assert measured > 3, "nothing grows, so the test shows nothing"
    assert key_growth(moments, (far,), (far,))[0, 0] == 1


def test_without_rotation_positions_do_not_matter() -> None:
    rng = np.random.default_rng(4)
    moments = moments_of(rng.standard_normal((100, D)), rng.standard_normal((100, D)), "none")
    one, other = (fit_keys(moments, (Positions(*where),)) for where in ((0, 10), (500, 9000)))
    assert all(np.array_equal(*tables) for tables in zip(one, other, strict=True))
    assert key_growth(moments, (Positions(0, 10),), (Positions(500, 9000),))[0, 0] == pytest.approx(1)


def test_heads_without_attention_or_keys_have_a_transform(moments: KeyMoments) -> None:
    frequency, partner = layout("opposite")
    nothing = np.zeros((1, 1)), np.zeros((1, 1, D)), np.zeros((1, 1, D, D))
    rotary = Rotary(frequency[None].astype(np.float32), partner)
    dead = key_moments(nothing, nothing, nothing[2], rotary)
    transform, _ = fit_keys(dead, (Positions(0, 100),))
    assert np.linalg.cond(transform[0, 0].astype(np.float64)) < 2
    assert key_growth(dead, (Positions(0, 10),), (Positions(0, 100),))[0, 0] == 1
    unseen = replace(moments, attended=moments.plain)
    weight = np.full((1, 1), 500.0)
    mean = moments.plain.mean.astype(np.float64)
    again = key_moments((weight, 500 * mean, 500 * moments.plain.second(0)[None]), nothing, nothing[2], rotary)
    assert np.allclose(again.attended.mean, unseen.attended.mean)


def test_sliding_layers_see_the_positions_before_the_token_at_hand() -> None:
    assert layer_positions((4096, 512), 4096) == (Positions(0, 4096), Positions(3584, 4096))
