"""Tiny material to profile on, and what it means that two profiles are the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcompile.artifacts import Artifact
from kvcompile.profile import Material, Profiled, read_rotary
from kvcompile.stages import Profile

TABLES = ("loss", "key_loss", "value_loss", "baklava", "squeeze", "surfacelogic")


@dataclass(frozen=True)
class Question:
    prompt_ids: NDArray[np.int64]
    answer_ids: NDArray[np.int64]
    needles: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Asked:
    kind: str
    first: int
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class Story:
    family: str
    context: NDArray[np.int64]
    follow_ups: tuple[Asked, ...]
    replayed: tuple[int, int] = (0, 0)


def story(draw: np.random.Generator, family: str, replay: bool, length: int = 48) -> Story:
    context = draw.integers(3, 61, length)
    asked = [Asked("continuation", 0, draw.integers(3, 61, 8)), Asked("question", 3, draw.integers(3, 61, 6))]
    if replay:
        return Story(family, context, (*asked, Asked("replay", 2, draw.integers(3, 61, 34))), (4, 36))
    return Story(family, context, (*asked, Asked("quote", 4, draw.integers(3, 61, 9))))


def material(probes: list[Question] | None = None, length: int = 48) -> Material:
    draw = np.random.default_rng(0)
    asked = [Question(draw.integers(3, 61, 40), draw.integers(3, 61, 3), ((4, 8),)) for _ in range(2)]
    fit = [story(draw, name, True, length) for name in ("code", "essay")]
    return Material(
        fit, [story(draw, name, False, length) for name in ("code", "essay")], asked if probes is None else probes
    )


def assert_same(left: Profiled, right: Profiled) -> None:
    for name in ("tokens", "shares", "key_bits", "value_bits", *TABLES):
        np.testing.assert_array_equal(getattr(left.profile, name), getattr(right.profile, name))
    for one, two in ((left.scorer, right.scorer), (left.quantiser, right.quantiser)):
        assert all(np.array_equal(vars(one)[name], vars(two)[name]) for name in vars(one))
    assert (left.checks, left.probes, left.answered) == (right.checks, right.probes, right.answered)
    assert (left.profile.factor, left.profile.families) == (right.profile.factor, right.profile.families)


def with_rotary(artifact: Artifact, model: Any) -> Artifact:
    """The artifact with the model's rotary embedding, as its profile would hold it."""
    rotary = read_rotary(model, artifact.target.context)
    own = {"rotary_frequency": rotary.frequency, "rotary_partner": rotary.partner}
    return replace(artifact, profile={**artifact.profile, **own})


def tiny_profile(layers: int = 2, heads: int = 3) -> Profile:
    """Of two families and two codecs, in a window of 64 tokens; random losses, as long as every name has its own."""
    draw, each = np.random.default_rng(5), (2, layers, heads)

    def losses(*shape: int) -> NDArray[np.float32]:
        return draw.uniform(1e-4, 1e-2, (*each, *shape)).astype(np.float32)

    curves = losses(2, 4)
    curves[..., -1] = 0
    return Profile(
        families=("code", "essay"), window=64, tokens=np.array([5, 12, 30, 64], np.int32),
        shares=np.array([1, 0.5], np.float32), loss=curves, key_bits=np.array([8, 4], np.int32),
        value_bits=np.array([8, 4], np.int32), key_loss=losses(2), value_loss=losses(2), factor=1.5, correlation=0.5,
        baklava=losses()[0], squeeze=losses()[0, :, 0], surfacelogic=losses()[0],
    )  # fmt: skip
